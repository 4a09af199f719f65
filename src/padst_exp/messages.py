"""What is said to the person who started this, on whichever terminal, pipe or file is there."""

from __future__ import annotations

import io
import os
import select
import sys
from errno import EIO, EPIPE
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from typing_extensions import Buffer

UNREAD_S = 5.0
"""How long a reader that reads no more is waited for, once."""


def say(line: str) -> None:
    """Write one line to stderr, on one process of a run; above the bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


def printable(text: str) -> str:
    """`text` without line breaks, and without what would speak to the terminal."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def outlive_readers() -> None:
    """Let what cannot be written to stdout and stderr be dropped, from here on.

    A terminal that is gone, a pipe that nobody reads and a full disk are no reason to end, or to
    wait. Where one of the two is closed, it is opened on nothing: the next file that is opened
    would take its number, and whatever a library has to say would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        sys.stdout = _stream(1, sys.stdout)
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = _stream(2, sys.stderr)


def _stream(descriptor: int, before: TextIO | None) -> TextIO:
    if before is not None:
        try:
            before.flush()
        except OSError:
            _to_nowhere(descriptor)
    return io.TextIOWrapper(
        io.BufferedWriter(_Unbreakable(descriptor, "w", closefd=False)),
        encoding="utf-8" if before is None else before.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


class _Unbreakable(io.FileIO):
    """Drops what cannot be written."""

    patience = UNREAD_S

    def write(self, content: Buffer) -> int:
        rest = memoryview(content).cast("B")
        size = len(rest)
        try:
            # What is ready has room for a page, which a pipe takes as a whole.
            while rest and select.select([], [self], [], self.patience)[1]:
                rest = rest[super().write(rest[: select.PIPE_BUF]) or len(rest) :]
            self.patience = 0.0 if rest else UNREAD_S
        except OSError as error:
            if error.errno in (EPIPE, EIO):  # for good
                _to_nowhere(self.fileno())
        return size


def _to_nowhere(descriptor: int) -> None:
    """Let all that is written to `descriptor`, by libraries too, be dropped without an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
