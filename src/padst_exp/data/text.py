"""Small texts: a tokenizer of their own, a bigram baseline, no download."""

import gzip
import hashlib
import io
import lzma
from importlib import resources
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from padst_exp.cache import cached
from padst_exp.data.bigram import Bigram
from padst_exp.data.sources import existing
from padst_exp.data.task import LanguageModeling
from padst_exp.data.tokens import TokenStream, TrainBlocks, ValidationBlocks
from padst_exp.errors import require
from padst_exp.files import reading
from padst_exp.messages import say

# The tokenizer reserves memory for so many, whatever the text has.
BYTES, MOST_TOKENS = 256, 1 << 20
WORK_SEPARATOR = "\f\n"


def train_bpe(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `text`, kept in `cache_folder()` under a hash of text and size.

    Any text can be encoded; the same text gives the same tokenizer.
    """
    digest = hashlib.sha256(f"bpe 2 {vocab_size} {text}".encode()).hexdigest()[:16]
    return cached(f"bpe-{digest}", lambda: _trained(text, vocab_size), Tokenizer.from_str)


def _trained(text: str, vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    made: str = tokenizer.to_str()
    return made


class _OwnTokenizer(LanguageModeling):
    """Language modelling of a text by a byte-level BPE trained on its training part."""

    tokenizer: Tokenizer

    def __init__(
        self, *, train_text: str, validation_text: str, vocab_size: int, context_length: int
    ) -> None:
        enough = BYTES <= vocab_size <= MOST_TOKENS
        wanted = f"at least {BYTES}, all bytes, and at most {MOST_TOKENS}"
        require(enough, "dataset.vocab_size", vocab_size, wanted)
        require(context_length >= 1, "dataset.context_length", context_length, "at least 1")
        self.tokenizer = train_bpe(train_text, vocab_size)
        # A short text may not have as many merges as asked for.
        size = self.tokenizer.get_vocab_size()
        super().__init__(vocab_size=size, context_length=context_length)
        self.train_tokens = self._encoded(train_text)
        self.validation_tokens = self._encoded(validation_text)
        self.words = len(validation_text.split()) + validation_text.count("\n")
        self.bytes = len(validation_text.encode())
        say(
            f"text: {len(self.train_tokens):,} tokens for training, "
            f"{len(self.validation_tokens):,} for validation"
        )
        self.train = TrainBlocks(TokenStream(self.train_tokens), context_length, moving=True)
        self.validation = ValidationBlocks(TokenStream(self.validation_tokens), context_length)

    def _encoded(self, text: str) -> NDArray[np.int64]:
        return np.array(self.tokenizer.encode_batch_fast([text])[0].ids, np.int64)

    def baselines(self) -> dict[str, float]:
        bigram = Bigram(self.train_tokens, self.model_shape["vocab_size"])
        return {"bigram_perplexity": bigram.perplexity(self.validation_tokens)}


class Shakespeare(_OwnTokenizer):
    """Eleven plays and the Sonnets, 1.46 MB, inside the package; the last play is for tests.

    Origin: assets/README.md.

    Args:
        split: to evaluate on: the last play, or the one before, which trains nothing then.
        vocab_size: tokens of the BPE, at least 256.
        context_length: tokens of one sample.
    """

    def __init__(
        self, *, split: Literal["test", "held_out"], vocab_size: int, context_length: int
    ) -> None:
        asset = resources.files("padst_exp.data") / "assets" / "shakespeare.txt.xz"
        works = lzma.decompress(asset.read_bytes()).decode("ascii").split(WORK_SEPARATOR)
        if split == "held_out":
            works.pop()
        super().__init__(
            train_text="\n".join(works[:-1]),
            validation_text=works[-1],
            vocab_size=vocab_size,
            context_length=context_length,
        )


class TextFile(_OwnTokenizer):
    """A text file of yours, in UTF-8, plain or gzipped; its end is the validation split.

    Args:
        path: the file.
        validation_fraction: share of its characters, cut at a line break if there is one.
        vocab_size: tokens of the BPE, at least 256.
        context_length: tokens of one sample.

    Raises:
        UserError: the file is missing, not UTF-8, or too short.
    """

    def __init__(
        self,
        *,
        path: str,
        validation_fraction: float,
        vocab_size: int,
        context_length: int,
    ) -> None:
        valid = 0 < validation_fraction < 1
        require(valid, "dataset.validation_fraction", validation_fraction, "between 0 and 1")
        file = existing(path, "path")
        wanted = "one file of plain text (join a folder's by cat; jsonl and shards: dataset=c4)"
        plain = not file.is_dir() and file.suffix not in (".jsonl", ".parquet")
        require(plain, "dataset.path", path, wanted)
        with reading("dataset.path", file, "UTF-8 text"):
            content = file.read_bytes()
            if file.suffix == ".gz":
                content = gzip.decompress(content)
            # As text files are read: whatever ends a line becomes a line break.
            text = io.TextIOWrapper(io.BytesIO(content), "utf-8").read()
            if not text:
                raise EOFError("there is no text in it")
        end = int(len(text) * (1 - validation_fraction))
        # At a line break, or between words in a text of one line.
        cut = (text.rfind("\n", 0, end) + 1) or (text.rfind(" ", 0, end) + 1) or end
        require(cut > 0, "dataset.path", path, "a text long enough to be cut in two")
        super().__init__(
            train_text=text[:cut],
            validation_text=text[cut:],
            vocab_size=vocab_size,
            context_length=context_length,
        )
