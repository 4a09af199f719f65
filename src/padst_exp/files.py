"""How the user's files are read: whatever is wrong with one is told in one line."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from padst_exp.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LONGEST_REASON = 200


@contextmanager
def reading(key: str, path: object, wanted: str) -> Iterator[None]:
    """A block that reads a file and does nothing else: any error in it is the file's.

    Libraries raise almost anything on a damaged file, so that no list of exceptions is complete.

    Args:
        key: of the config that names the file.
        path: the file, or what else tells the user where to look when it is printed.
        wanted: what would be right.

    Raises:
        UserError: for every error in the block, as `key: expected <wanted>, got <path> (<why>)`.
            One that is a `UserError` already passes as it is. A pipe or a device, which may never
            end, is refused before the block.
    """
    if isinstance(path, Path) and _endless(path):
        raise UserError(f"{key}: expected {wanted}, got {path} (it is a pipe or a device)")
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # A panic of a library in Rust (tokenizers, safetensors) is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = _state(Path(path)) if isinstance(path, str | Path) else None
        if why is None and isinstance(error, FileNotFoundError) and error.filename == str(path):
            why = "there is no such file"
        why = why or reason(error)
        raise UserError(f"{key}: expected {wanted}, got {path} ({why})") from error


def read_text(key: str, path: Path, wanted: str, *, most: int | None = None) -> str:
    """The text of a file in UTF-8.

    Args:
        key, path, wanted: as in `reading`.
        most: bytes; what is longer is refused unread.
    """
    with reading(key, path, wanted):
        size = path.stat().st_size
        if most is not None and size > most:
            raise ValueError(f"it has {size} bytes, {most} at most are one")
        return path.read_text("utf-8")


def sha256(path: Path) -> str:
    """Hex digest of what a file holds."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """What an error says, in one short line of printable characters."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    line = " ".join(text.split()) or type(error).__name__
    if isinstance(error, KeyError):
        line = f"it has no {line}"
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."


def _endless(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _state(path: Path) -> str | None:
    """What is wrong with a file whatever its format, None where nothing is."""
    try:
        if path.is_symlink() and not path.exists():
            return f"it is a link to {path.readlink()}, and nothing is there"
        if not path.is_file():
            return None
        if path.stat().st_size == 0:
            return "it is empty"
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except PermissionError:
        return "you may not read it"
    except (OSError, ValueError):  # what `error` says is enough then
        return None
    return "it is a pointer of Git LFS, git lfs pull fetches the file" if is_pointer else None
