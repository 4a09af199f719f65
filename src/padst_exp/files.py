"""How the user's files are read: whatever is wrong with one is told in one line."""

from __future__ import annotations

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
            One that is a `UserError` already passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # A panic of a library in Rust (tokenizers, safetensors) is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = _state(Path(path)) if isinstance(path, str | Path) else None
        why = why or reason(error)
        raise UserError(f"{key}: expected {wanted}, got {path} ({why})") from error


def reason(error: BaseException) -> str:
    """What an error says, in one short line of printable characters."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    line = " ".join(text.split()) or type(error).__name__
    if isinstance(error, KeyError):
        line = f"it has no {line}"
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."


def _state(path: Path) -> str | None:
    """What is wrong with a file whatever its format, None where nothing is."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size == 0:
            return "it is empty"
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except (OSError, ValueError):  # what `error` says is enough then
        return None
    return "it is a pointer of Git LFS, git lfs pull fetches the file" if is_pointer else None
