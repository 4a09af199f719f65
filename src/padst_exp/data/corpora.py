"""WikiText-103 and C4 as GPT-2 tokens, tokenised once by `datasets` and read from its cache."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from padst_exp.data.sources import (
    Split,
    existing,
    first_line,
    load_files,
    load_hub,
    require_columns,
    require_hub,
)
from padst_exp.data.task import LanguageModeling
from padst_exp.data.tokens import TokenStream, TrainBlocks, ValidationBlocks
from padst_exp.errors import UserError, require

if TYPE_CHECKING:
    import datasets

END_OF_TEXT = "<|endoftext|>"
GPT2_HUB = "openai-community/gpt2"
C4_HUB_SHARDS: Mapping[str, int] = {"train": 1024, "validation": 8}


def gpt2_tokenizer(vocab: str | None, merges: str | None) -> Tokenizer:
    """GPT-2's byte-level BPE (Radford et al. 2019).

    Args:
        vocab, merges: local files in GPT-2's format (encoder.json or vocab.json; vocab.bpe or
            merges.txt), or neither, for the hub's.

    Raises:
        UserError: a file is missing or broken, or the hub cannot be reached.
    """
    if (vocab is None) != (merges is None):
        missing, given = ("merges", "vocab") if merges is None else ("vocab", "merges")
        require(False, f"dataset.{missing}", None, f"a file to go with dataset.{given}")
    if vocab is None or merges is None:
        return _hub_tokenizer()
    files = str(existing(vocab, "vocab")), str(existing(merges, "merges"))
    try:
        tokenizer = Tokenizer(models.BPE.from_file(*files))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(
            f"dataset.vocab: expected GPT-2's two files, here and in dataset.merges, got {vocab} "
            f"and {merges} ({first_line(error)})"
        ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    has_end = tokenizer.token_to_id(END_OF_TEXT) is not None
    require(has_end, "dataset.vocab", vocab, f"a file with the token {END_OF_TEXT}")
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
            f"({first_line(error)})"
        ) from error


def tokenised(rows: "datasets.Dataset", tokenizer: Tokenizer) -> TokenStream:
    """All rows of a column `text`, an end-of-text token after each that is not blank.

    Tokenising happens once for a text and a tokenizer: `datasets` keeps the result on disk, and
    the stream reads it from there, memory-mapped.

    Raises:
        UserError: there is no column `text`.
    """
    import datasets
    from datasets.fingerprint import Hasher

    require_columns(rows, "text")
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None

    def tokenise(batch: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        # The hub writes blank lines as empty rows, text files as spaces and a line break.
        texts = [text for text in batch["text"] if text.strip()]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {"ids": [[*encoding.ids, end] for encoding in encodings]}

    table = rows.map(
        tokenise,
        batched=True,
        remove_columns=rows.column_names,
        features=datasets.Features({"ids": datasets.Sequence(datasets.Value("int32"))}),
        # By content: a tokenizer's pickle is no stable name.
        new_fingerprint=Hasher.hash([rows._fingerprint, tokenizer.to_str(), "tokenised 1"]),
        desc="tokenising",
    )
    chunks = table.data.column("ids").chunks
    return TokenStream([chunk.flatten().to_numpy() for chunk in chunks])


def count_words(rows: "datasets.Dataset") -> int:
    """White-space separated words, plus one end of line for each line, blank ones too.

    The convention of word-level WikiText, by which wiki.valid.tokens has 217,646.
    """
    return sum(len(text.split()) + 1 for text in rows["text"])


class Wikitext103(LanguageModeling):
    """WikiText-103 (Merity et al. 2016), raw, in GPT-2 tokens.

    Perplexity is per token; word_perplexity is exp(mean loss * tokens / words), with words as in
    `count_words` of the evaluated split, which makes tokenizers comparable.

    Args:
        root: a folder with wiki.train.raw and wiki.valid.raw (or .tokens, or the hub's parquet
            files); null: the hub's Salesforce/wikitext, wikitext-103-raw-v1.
        split: to evaluate on.
        context_length: tokens of one sample.
        vocab, merges: local files of GPT-2's tokenizer, see `gpt2_tokenizer`.
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
        train, held_out = (self._rows(root, name) for name in ("train", split))
        train_stream, stream = tokenised(train, tokenizer), tokenised(held_out, tokenizer)
        super().__init__(
            vocab_size=tokenizer.get_vocab_size(),
            context_length=context_length,
            tokens_per_word=len(stream) / count_words(held_out),
        )
        self.train = TrainBlocks(train_stream, context_length, moving=False)
        self.validation = ValidationBlocks(stream, context_length)

    @staticmethod
    def _rows(root: str | None, split: Split) -> "datasets.Dataset":
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
        context_length: tokens of one sample.
        vocab, merges: local files of GPT-2's tokenizer, see `gpt2_tokenizer`.
    """

    def __init__(
        self,
        *,
        root: str | None,
        shards: int,
        validation_shards: int,
        documents: int | None,
        validation_documents: int | None,
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
        tokenizer = gpt2_tokenizer(vocab, merges)
        super().__init__(vocab_size=tokenizer.get_vocab_size(), context_length=context_length)
        train = self._rows(root, "train", shards, documents)
        validation = self._rows(root, "validation", validation_shards, validation_documents)
        self.train = TrainBlocks(tokenised(train, tokenizer), context_length, moving=False)
        self.validation = ValidationBlocks(tokenised(validation, tokenizer), context_length)

    @staticmethod
    def _rows(
        root: str | None, split: Split, shards: int, documents: int | None
    ) -> "datasets.Dataset":
        if root is None:
            total = C4_HUB_SHARDS[split]
            names = [f"en/c4-{split}.{i:05d}-of-{total:05d}.json.gz" for i in range(shards)]
            rows = load_hub("allenai/c4", name=None, split=split, files=names)
        else:
            rows = load_files(existing(root, "root"), split)
        return rows if documents is None else rows.select(range(min(documents, len(rows))))
