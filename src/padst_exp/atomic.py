"""Files that are seen whole or not at all, by other processes and after a crash.

A link that somebody left where a file of ours belongs is replaced, never followed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from padst_exp.processes import Process

DAY_S = 24 * 3600


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, on disk for good by then.

    Creates the folder of `path`. Several processes may replace one file at a time. What processes
    left that were killed while they did is removed.

    Raises:
        OSError: it cannot be written. What `path` held is then untouched, as it is after any other
            error in the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = temporary_name(path)
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


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else uses, and that says whose it is."""
    return path.with_name(f".{path.name}.{Process.here()}-{uuid.uuid4().hex[:8]}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what is called as by `temporary_name`, unless its owner may still live.

    An owner on another host is given a day.
    """
    for left in folder.glob(".*.tmp"):
        owner = Process.parse(left.name.split(".")[-2].rpartition("-")[0])
        with contextlib.suppress(OSError):
            alive = owner is None or owner.lives()  # what is not ours stays
            if alive is None:
                alive = time.time() - left.lstat().st_mtime < DAY_S
            if alive:
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()


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
