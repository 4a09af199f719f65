"""Files that are seen whole or not at all, by other processes and after a crash.

A link that somebody left where a file of ours belongs is replaced, never followed.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, on disk for good by then.

    Creates the folder of `path`. Several processes may replace one file at a time.

    Raises:
        OSError: it cannot be written. What `path` held is then untouched, as it is after any other
            error in the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Let `path` hold `text`, as in `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def own_descriptor(path: str, flags: int) -> int:
    """What `open` takes as its `opener`, so that it fails where `path` is a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync(path: Path) -> None:
    """Bring a file, or the list of names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
