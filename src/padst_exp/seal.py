"""Whether somebody else wrote to a buffer from which other things were derived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Seal:
    """Notices writes in place to one buffer, those of equal contents left out.

    PyTorch counts the writes to a tensor; only where there were any are contents compared, which
    waits for the device. A buffer that is another tensor than before is sealed anew: whoever puts
    one in its place derives anew as well. So is a copy, whose tensor has a count of its own.

    Args:
        mark: of contents, by which they are compared later: a copy, or something smaller.
    """

    def __init__(self, mark: Callable[[Tensor], Tensor]) -> None:
        self._mark = mark
        self._known: tuple[Tensor, int, Tensor] | None = None

    def close(self, buffer: Tensor | None) -> None:
        """Take what `buffer` holds now for right."""
        self._known = None
        if buffer is not None and not buffer.is_inference():  # such a tensor counts no writes
            self._known = buffer, buffer._version, self._mark(buffer)

    def open(self) -> None:
        """Take whatever is there at the next look for right."""
        self._known = None

    def intact(self, buffer: Tensor | None) -> bool:
        """Whether `buffer` holds what it held; closes a seal that is open."""
        if self._known is None or self._known[0] is not buffer:
            self.close(buffer)
            return True
        _, version, mark = self._known
        if version == buffer._version:
            return True
        # Ranks may broadcast to each other what they hold already.
        if not torch.equal(self._mark(buffer), mark):
            return False
        self._known = buffer, buffer._version, mark
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}
