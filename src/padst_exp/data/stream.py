"""Text that is tokenised while training reads it, file by file, so that nothing waits for all."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from padst_exp.data.fingerprint import fingerprint
from padst_exp.data.sources import opened
from padst_exp.data.task import Batch
from padst_exp.data.tokens import encoded
from padst_exp.errors import require
from padst_exp.files import reading
from padst_exp.messages import say
from padst_exp.seeds import seed_of

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

ROWS = 256
"""Documents that are read, shuffled and tokenised at a time."""
ENDS = 1 << 16
"""Bytes at each end of a file that tell it from another."""
POSITION = 4
"""Where a stream is: its pass, the file in it, the group of `ROWS` rows in that, the token."""


class TextStream:
    """Files of documents as several endless streams of tokens, read side by side.

    Where the number of streams divides that of the files, each stream has files of its own; else
    it has its share of the rows of all of them. In each pass the files come in another order, and
    so do the documents within `ROWS` of them. A batch takes as many blocks of each stream, so that
    neither processes nor data workers change what is in it; a stream goes on from where it was.

    Args:
        files: local, or of the hub.
        builder: of `datasets`, that reads them; their column `text` is used.
        tokenizer: makes the tokens.
        end: token after each document.
        context_length: tokens of one block, the next token of each is its target.
        streams: how many.

    Raises:
        UserError: there is no column `text`, or the first file cannot be read.
    """

    def __init__(
        self,
        files: Sequence[str],
        builder: str,
        tokenizer: Tokenizer,
        *,
        end: int,
        context_length: int,
        streams: int,
    ) -> None:
        require(streams >= 1, "dataset.streams", streams, "at least 1")
        self.files, self.builder, self.tokenizer = tuple(files), builder, tokenizer
        self.end, self.context_length, self.streams = end, context_length, streams
        next(self.groups(0, 0), None)
        say(f"train: {len(files)} {builder} file(s) in {streams} stream(s), from {files[0]}")

    def fingerprint(self) -> str:
        """Of the files' names and sizes, of both ends of each, and of the tokenizer."""
        ends = [hashlib.sha256(part).hexdigest() for file in self.files for part in _ends(file)]
        names = [os.path.basename(file) for file in self.files]
        return fingerprint(self.streams, self.end, self.tokenizer.to_str(), names, ends)

    def require_position(self, position: object) -> None:
        """Raise a `ValueError` unless this could be where the streams are."""
        shape = [self.streams, POSITION]
        if not isinstance(position, Tensor) or position.dtype != torch.int64:
            raise ValueError("it is no tensor of int64")
        if list(position.shape) != shape or bool(((position < 0) | (position >= 2**31)).any()):
            raise ValueError(f"it is no table of numbers {shape}")

    def groups(self, file: int, first: int) -> Iterator[tuple[int, list[str]]]:
        """Number and documents of each group of up to `ROWS` in a file, from `first` on."""
        name = self.files[file]
        for number, table in enumerate(self._tables(name)):
            if number < first:
                continue
            have = table.column_names
            found = f"only {', '.join(have)} in {name}"
            require("text" in have, "dataset.root", found, "a column 'text'")
            texts = table.column("text").to_pylist()
            odd = next((row for row, text in enumerate(texts) if type(text) is not str), None)
            if odd is not None:
                place = f"row {number * ROWS + odd} of {name}"
                require(False, "dataset.root", f"{texts[odd]} in {place}", "text")
            yield number, texts

    def _tables(self, name: str) -> "Iterator[pa.Table]":
        wanted = f"a readable train {self.builder} file"
        place = name if "://" in name else Path(name)
        with reading("dataset.root", place, wanted):
            tables = opened(self.builder, name).with_format("arrow").iter(ROWS)
        while True:
            with reading("dataset.root", place, wanted):
                table = next(tables, None)
            if table is None:
                return
            yield table


class StreamReader(Dataset[Batch]):
    """Blocks of some streams, in order: a sample is addressed by the number of its stream.

    Args:
        stream: of which.
        seed: of the order of files and documents.
        numbers: of those that are read here.
        position: int64 `[len(numbers), POSITION]`, where each goes on; None: at its beginning.
    """

    def __init__(
        self, stream: TextStream, *, seed: int, numbers: Sequence[int], position: Tensor | None
    ) -> None:
        start = torch.zeros(len(numbers), POSITION, dtype=torch.int64)
        places = (start if position is None else position).tolist()
        self.streams = {
            number: _Stream(stream, seed=seed, number=number, position=place)
            for number, place in zip(numbers, places, strict=True)
        }

    def position(self) -> Tensor:
        """Where these streams are, int64 `[len(numbers), POSITION]`."""
        return torch.tensor([stream.position for stream in self.streams.values()])

    def __getitems__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets int64 `[B, context_length]`, and the position after them."""
        blocks = [self.streams[number].block() for number in numbers]
        tokens = torch.from_numpy(np.stack(blocks).astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:], self.position()


class _Stream:
    def __init__(
        self, stream: TextStream, *, seed: int, number: int, position: Sequence[int]
    ) -> None:
        self.stream, self.seed, self.number = stream, seed, number
        self.first, self.offset = tuple(position[:-1]), position[-1]
        self.tokens = np.empty(0, np.int32)  # of the groups in `held`
        self.held = deque[tuple[tuple[int, ...], int]]()
        self.rest: Iterator[tuple[tuple[int, ...], NDArray[np.int32]]] | None = None

    @property
    def position(self) -> tuple[int, ...]:
        return (*(self.held[0][0] if self.held else self.first), self.offset)

    def block(self) -> NDArray[np.int32]:
        size = self.stream.context_length
        if self.rest is None:
            self.rest = self._groups()
        while len(self.tokens) - self.offset < size + 1:
            place, tokens = next(self.rest)
            self.held.append((place, len(tokens)))
            self.tokens = np.concatenate([self.tokens, tokens])
        block = self.tokens[self.offset : self.offset + size + 1]
        self.offset += size
        while self.offset >= self.held[0][1]:
            _, length = self.held.popleft()
            self.tokens, self.offset = self.tokens[length:], self.offset - length
        return block

    def _groups(self) -> Iterator[tuple[tuple[int, ...], NDArray[np.int32]]]:
        """The tokens of each group from `first` on, and which it is."""
        stream, (first_pass, first_file, first_group) = self.stream, self.first
        for number in count(first_pass):
            found = False
            for place, file in enumerate(self._files(number)):
                if place < first_file:
                    continue
                for group, texts in stream.groups(file, first_group):
                    kept = self._share(texts, number, file, group)
                    tokens = encoded(kept, stream.tokenizer, stream.end)
                    found = found or len(tokens) > 0
                    yield (number, place, group), tokens
                first_group = 0
            first_file = 0
            wanted = f"text for each of dataset.streams={stream.streams}"
            require(found, "dataset.root", f"none for one in {stream.files[0]}", wanted)

    @property
    def _has_own_files(self) -> bool:
        return len(self.stream.files) % self.stream.streams == 0

    def _files(self, number: int) -> list[int]:
        """Those of one pass."""
        order = _order(len(self.stream.files), "files", self.seed, number)
        return order[self.number :: self.stream.streams] if self._has_own_files else order

    def _share(self, texts: list[str], number: int, file: int, group: int) -> list[str]:
        order = _order(len(texts), "rows", self.seed, number, file, group)
        if not self._has_own_files:
            order = order[(self.number + group) % self.stream.streams :: self.stream.streams]
        return [texts[row] for row in order]


def _order(length: int, purpose: str, *seeds: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(purpose, *seeds))
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order


def _ends(file: str) -> Iterator[bytes]:
    if "://" in file:  # its name says what it is
        return
    with reading("dataset.root", Path(file), "a file of text"), open(file, "rb") as content:
        size = os.path.getsize(file)
        ends = [str(size).encode(), content.read(ENDS)]
        content.seek(max(0, size - ENDS))
        ends.append(content.read(ENDS))
    yield from ends
