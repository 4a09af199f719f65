"""WikiText-103 and C4 as GPT-2 tokens, tokenised once by `datasets` and read from its cache."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from padst_exp.cache import cached_array
from padst_exp.data.sources import (
    Place,
    Split,
    Table,
    existing,
    files_of,
    load_files,
    load_hub,
    require_columns,
    require_hub,
)
from padst_exp.data.stream import TextStream
from padst_exp.data.task import LanguageModeling
from padst_exp.data.tokens import TokenStream, TrainBlocks, ValidationBlocks, encoded
from padst_exp.errors import UserError, require
from padst_exp.files import reading, reason
from padst_exp.messages import say

if TYPE_CHECKING:
    import datasets

END_OF_TEXT = "<|endoftext|>"
GPT2_HUB = "openai-community/gpt2"
C4_HUB = "allenai/c4"
C4_HUB_SHARDS: Mapping[str, int] = {"train": 1024, "validation": 8}


def gpt2_tokenizer(vocab: str | None, merges: str | None) -> Tokenizer:
    """GPT-2's byte-level BPE (Radford et al. 2019).

    Args:
        vocab, merges: local files in GPT-2's format (encoder.json or vocab.json; vocab.bpe or
            merges.txt), or `vocab` alone: a tokenizer.json, or neither, for the hub's.

    Raises:
        UserError: a file is missing, broken or does not fit the other, or the hub cannot be
            reached.
    """
    if vocab is None:
        require(merges is None, "dataset.vocab", None, "a file to go with dataset.merges")
        return _hub_tokenizer()
    path = existing(vocab, "vocab")
    with reading("dataset.vocab", path, "GPT-2's tokens, or a tokenizer.json"):
        content = json.loads(path.read_text("utf-8"))
        whole = isinstance(content.get("model"), dict)
        tokenizer = Tokenizer.from_file(str(path)) if whole else None
        tokens = content if tokenizer is None else tokenizer.get_vocab()
        if not all(type(number) is int for number in tokens.values()):
            raise ValueError("not every token has a number")
    require(END_OF_TEXT in tokens, "dataset.vocab", vocab, f"a file with the token {END_OF_TEXT}")
    ids, size = set(tokens.values()), len(tokens)
    found = f"others in {vocab}, up to {max(ids, default='none')}"
    wanted = f"the numbers 0 to {size - 1} for its {size} tokens"
    require(ids == set(range(size)), "dataset.vocab", found, wanted)
    if tokenizer is not None:
        require(merges is None, "dataset.merges", merges, "null beside a tokenizer.json")
        return tokenizer
    if merges is None:
        raise UserError(f"dataset.merges: expected a file to go with {vocab}, got None")
    return _byte_level(tokens, existing(merges, "merges"))


def _byte_level(tokens: dict[str, int], merges: Path) -> Tokenizer:
    with reading("dataset.merges", merges, "the merges of the tokens in dataset.vocab"):
        lines = merges.read_text("utf-8").split("\n")
        words = [line.split() for line in lines if not line.startswith("#version")]
        pairs = [(pair[0], " ".join(pair[1:])) for pair in words if pair]
        # Every token but single bytes and special ones comes out of a merge.
        special = re.compile(r"<.*>|\[.*\]", re.DOTALL)
        unmade = {token for token in tokens if len(token) > 1 and not special.fullmatch(token)}
        for pair in pairs:
            if not {*pair, "".join(pair)} <= tokens.keys():
                raise ValueError(f"{' '.join(pair)!r} is no merge of two tokens")
            unmade.discard("".join(pair))
        if unmade:
            raise ValueError(f"no merge makes {min(unmade)!r} and {len(unmade) - 1} others")
        tokenizer = Tokenizer(models.BPE(tokens, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _hub_tokenizer() -> Tokenizer:
    from huggingface_hub import hf_hub_download

    local = "GPT-2's encoder.json, and dataset.merges its vocab.bpe"
    require_hub("dataset.vocab", local)
    try:
        return Tokenizer.from_file(hf_hub_download(GPT2_HUB, "tokenizer.json"))
    except Exception as error:  # of the hub, of httpx: what matters is the line
        raise UserError(
            f"dataset.vocab: expected {local}, got None; the hub did not give {GPT2_HUB} "
            f"({reason(error)})"
        ) from error


def tokenised(table: Table, tokenizer: Tokenizer) -> TokenStream:
    """All rows of a column `text`, an end-of-text token after each that is not blank.

    Tokenising happens once for a text and a tokenizer: the tokens are kept in `cache_folder()`,
    from where the stream is mapped into memory. A damaged copy is made again.

    Raises:
        UserError: there is no column `text`, or a cell of it holds none.
    """
    from datasets.fingerprint import Hasher

    rows = table.rows
    require_columns(rows, "text")
    end = _end(tokenizer)
    # By content: a tokenizer's pickle is no stable name.
    name = Hasher.hash([rows._fingerprint, tokenizer.to_str(), "tokenised 2"])

    def pieces() -> Iterator[NDArray[np.int32]]:
        with tqdm(total=len(rows), desc="tokenising", unit=" rows", leave=False) as progress:
            for batch in rows.select_columns("text").iter(1000):
                odd = [number for number, text in enumerate(batch["text"]) if type(text) is not str]
                if odd:
                    place = Place(table, progress.n + odd[0])
                    require(False, "dataset.root", f"{batch['text'][odd[0]]} in {place}", "text")
                yield encoded(batch["text"], tokenizer, end)
                progress.update(len(batch["text"]))

    size = tokenizer.get_vocab_size()
    stream = TokenStream(cached_array(f"tokens-{name}", pieces, below=size))
    say(f"{len(stream):,} tokens in {table.source}")
    return stream


def _end(tokenizer: Tokenizer) -> int:
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    return end


def count_words(rows: "datasets.Dataset") -> int:
    """White-space separated words, plus one end of line for each line, blank ones too.

    The convention of word-level WikiText, by which wiki.valid.tokens has 217,646.
    """
    return sum(len(text.split()) + 1 for text in rows["text"])


class Wikitext103(LanguageModeling):
    """WikiText-103 (Merity et al. 2016), raw, in GPT-2 tokens.

    Perplexity is per token; word_perplexity is exp(sum of the tokens' losses / words), with words
    as in `count_words` of the evaluated split, which makes tokenizers comparable; byte_perplexity
    is the same with its bytes, blank lines left out. The first token of the split has nothing to
    be predicted from: it adds no loss, its word counts.

    Args:
        root: a folder with wiki.train.raw and wiki.valid.raw (or .tokens, or the hub's parquet
            files); null: the hub's Salesforce/wikitext, wikitext-103-raw-v1.
        split: to evaluate on.
        context_length: tokens of one sample.
        vocab, merges: local files of a tokenizer, see `gpt2_tokenizer`.
    """

    def __init__(
        self,
        *,
        root: str | None,
        split: Literal["validation", "test"],
        context_length: int,
        vocab: str | None,
        merges: str | None,
    ) -> None:
        tokenizer = gpt2_tokenizer(vocab, merges)
        super().__init__(vocab_size=tokenizer.get_vocab_size(), context_length=context_length)
        self.tokenizer = tokenizer
        train, held_out = (self._rows(root, name) for name in ("train", split))
        train_stream, stream = tokenised(train, tokenizer), tokenised(held_out, tokenizer)
        self.words = count_words(held_out.rows)
        self.bytes = sum(len(text.encode()) for text in held_out.rows["text"] if text.strip())
        self.train = TrainBlocks(train_stream, context_length, moving=False)
        self.validation = ValidationBlocks(stream, context_length)

    @staticmethod
    def _rows(root: str | None, split: Split) -> Table:
        if root is None:
            return load_hub("Salesforce/wikitext", name="wikitext-103-raw-v1", split=split)
        return load_files(existing(root, "root"), split)


class C4(LanguageModeling):
    """The English part of C4 (Raffel et al. 2020) in GPT-2 tokens, or as many shards as wanted.

    Args:
        root: a folder with files of the two splits (c4-train.*.json.gz as on the hub, parquet or
            text, one document a row); null: the hub's allenai/c4.
        shards: training files to download, of 1,024 with 356,000 documents each; only of the hub.
        validation_shards: the same, of 8 with 45,000 documents each.
        documents: use only the first so many training documents, null for all.
        validation_documents: the same for validation.
        streaming: read and tokenise the training text while training goes on, see `TextStream`.
        streams: places that are read side by side then: a multiple of the number of processes,
            and a divisor of the batch size.
        context_length: tokens of one sample.
        vocab, merges: local files of a tokenizer, see `gpt2_tokenizer`.
    """

    def __init__(
        self,
        *,
        root: str | None,
        shards: int,
        validation_shards: int,
        documents: int | None,
        validation_documents: int | None,
        streaming: bool,
        streams: int,
        context_length: int,
        vocab: str | None,
        merges: str | None,
    ) -> None:
        for key, count, limit in (
            ("shards", shards, C4_HUB_SHARDS["train"]),
            ("validation_shards", validation_shards, C4_HUB_SHARDS["validation"]),
        ):
            require(1 <= count <= limit, f"dataset.{key}", count, f"1 to {limit}")
        for key, limit_or_none in (
            ("documents", documents),
            ("validation_documents", validation_documents),
        ):
            valid = limit_or_none is None or limit_or_none >= 1
            require(valid, f"dataset.{key}", limit_or_none, "at least 1, or null for all")
        whole = not streaming or documents is None
        require(whole, "dataset.documents", documents, "null with dataset.streaming=true")
        tokenizer = gpt2_tokenizer(vocab, merges)
        super().__init__(vocab_size=tokenizer.get_vocab_size(), context_length=context_length)
        self.tokenizer = tokenizer
        if streaming:
            builder, files = self._files(root, shards)
            self.train = TextStream(
                files,
                builder,
                tokenizer,
                end=_end(tokenizer),
                context_length=context_length,
                streams=streams,
            )
        else:
            train = self._rows(root, "train", shards, documents)
            self.train = TrainBlocks(tokenised(train, tokenizer), context_length, moving=False)
        validation = self._rows(root, "validation", validation_shards, validation_documents)
        self.validation = ValidationBlocks(tokenised(validation, tokenizer), context_length)

    @staticmethod
    def _files(root: str | None, shards: int) -> tuple[str, list[str]]:
        if root is not None:
            return files_of(existing(root, "root"), "train")
        require_hub("dataset.root", f"a local copy of {C4_HUB}")
        return "json", [f"hf://datasets/{C4_HUB}/{name}" for name in _hub_names("train", shards)]

    @staticmethod
    def _rows(root: str | None, split: Split, shards: int, documents: int | None) -> Table:
        if root is None:
            table = load_hub(C4_HUB, name=None, split=split, files=_hub_names(split, shards))
        else:
            table = load_files(existing(root, "root"), split)
        if documents is None:
            return table
        return Table(table.rows.select(range(min(documents, len(table.rows)))), table.files)


def _hub_names(split: Split, shards: int) -> list[str]:
    total = C4_HUB_SHARDS[split]
    return [f"en/c4-{split}.{number:05d}-of-{total:05d}.json.gz" for number in range(shards)]
