"""One long sequence of tokens, cut into samples of a model's context length."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from padst_exp.data.fingerprint import fingerprint
from padst_exp.data.task import IGNORED, Address, Batch
from padst_exp.errors import require
from padst_exp.seeds import seed_of


class TokenStream:
    """One-dimensional token ids, which may be mapped into memory and are never copied."""

    def __init__(self, tokens: NDArray[np.integer]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, starts: Sequence[int], length: int) -> NDArray[np.int64]:
        """Tokens [start, start + length) for each start, `[len(starts), length]`."""
        assert min(starts) >= 0 and max(starts) + length <= len(self)
        places = np.array(starts)[:, None] + np.arange(length)
        return self.tokens[places].astype(np.int64)

    def fingerprint(self) -> str:
        """Of some of the tokens."""
        return fingerprint(self.tokens)

    def __reduce__(self) -> tuple[object, ...]:
        # A data worker that is not forked maps the file again instead of receiving all of it.
        if isinstance(self.tokens, np.memmap) and self.tokens.filename is not None:
            return _remapped, (str(self.tokens.filename), self.tokens.dtype, self.tokens.shape)
        return TokenStream, (self.tokens,)


def encoded(texts: Sequence[str], tokenizer: Tokenizer, end: int) -> NDArray[np.int32]:
    """The tokens of all texts but blank ones, with `end` after each."""
    # The hub writes blank lines as empty rows, text files as spaces and a line break.
    kept = [text for text in texts if text.strip()]
    encodings = tokenizer.encode_batch_fast(kept, add_special_tokens=False)
    return np.array([i for e in encodings for i in (*e.ids, end)], np.int32)


def _remapped(path: str, dtype: "np.dtype[np.integer]", shape: tuple[int, ...]) -> TokenStream:
    return TokenStream(np.memmap(path, dtype, "r", shape=shape))


class TrainBlocks(Dataset[Batch]):
    """Consecutive blocks of `context_length` tokens with the next token of each as its target.

    Args:
        moving: whether the cuts move by a random number of tokens from epoch to epoch, which
            keeps a short text from being learnt in fixed pieces.
    """

    def __init__(self, stream: TokenStream, context_length: int, *, moving: bool) -> None:
        self.stream, self.context_length, self.moving = stream, context_length, moving
        self.seed = 0
        usable = len(stream) - 1 - (context_length - 1 if moving else 0)
        self.length = usable // context_length
        _require_block(self.length >= 1, context_length, f"{len(stream)} tokens of training text")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, address: Address) -> Batch:
        inputs, targets = self.__getitems__([address])
        return inputs[0], targets[0]

    def __getitems__(self, addresses: Sequence[Address]) -> Batch:
        size = self.context_length
        offsets = {epoch: self._offset(epoch) for epoch in {epoch for epoch, _ in addresses}}
        starts = [index * size + offsets[epoch] for epoch, index in addresses]
        tokens = torch.from_numpy(self.stream.windows(starts, size + 1))
        return tokens[:, :-1], tokens[:, 1:]

    def _offset(self, epoch: int) -> int:
        if not self.moving:
            return 0
        return seed_of("offset", self.seed, epoch) % self.context_length

    def fingerprint(self) -> str:
        """Of some of the tokens."""
        return self.stream.fingerprint()


class ValidationBlocks(Dataset[Batch]):
    """Blocks in which every token but the first of the text is a target exactly once.

    The last block reaches back to be full; targets that an earlier block has are `IGNORED`.
    """

    def __init__(self, stream: TokenStream, context_length: int) -> None:
        self.stream, self.context_length = stream, context_length
        fits = len(stream) > context_length
        _require_block(fits, context_length, f"{len(stream)} tokens of validation text")

    def __len__(self) -> int:
        return -((1 - len(self.stream)) // self.context_length)

    def __getitem__(self, index: int) -> Batch:
        size = self.context_length
        start = min(index * size, len(self.stream) - 1 - size)
        tokens = torch.from_numpy(self.stream.windows([start], size + 1)[0])
        targets = tokens[1:].clone()
        targets[: index * size - start] = IGNORED
        return tokens[:-1], targets

    def fingerprint(self) -> str:
        """Of some of the tokens."""
        return self.stream.fingerprint()


def _require_block(valid: bool, context_length: int, text: str) -> None:
    require(valid, "dataset.context_length", context_length, f"a length that fits into the {text}")
