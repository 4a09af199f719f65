"""How the user's files are read: whatever is wrong with one is told in one line."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from padst_exp.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
TRAINING_CONFIG = "a training config"
LONGEST_REASON = 200
MOST_YAML, DEEPEST_YAML = 1 << 20, 20
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
            One that is a `UserError` already passes as it is. What a `Path` leads to is refused
            before the block where no format could be right: a pipe or a device, which may never
            end, and a pointer of Git LFS, which could be taken for a text.
    """
    if isinstance(path, Path) and (what := _no_content(path)) is not None:
        raise UserError(f"{key}: expected {wanted}, got {path} ({what})")
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


def read_mapping(key: str, path: Path, wanted: str) -> dict[Any, Any]:
    """The mapping in a YAML file, in plain containers; nothing is built or resolved.

    Raises:
        UserError: as in `reading`; it is none, or stands for more than its text shows.
    """
    with reading(key, path, wanted):
        found = read_yaml(key, path, wanted)
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
        return found


def read_yaml(key: str, path: Path, wanted: str) -> object:
    """What stands in a YAML file, as `read_mapping`, be it a mapping or not."""
    with reading(key, path, wanted):
        text = read_text(key, path, wanted, most=MOST_YAML)
        require_modest_yaml(text)
        found: object = yaml.load(text, _LOADER)
        return found


def require_modest_yaml(text: str) -> None:
    """Refuse YAML of which a little text stands for any amount of memory or time.

    Raises:
        ValueError, YAMLError: says what it has.
    """
    depth = 0
    for event in yaml.parse(text, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_YAML:
            raise ValueError(f"it is nested more than {DEEPEST_YAML} deep")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has an alias, *{event.anchor}")


def require_no_link(key: str, path: Path) -> None:
    """Refuse to write into what only the sender of a run has chosen.

    Raises:
        UserError: `path` is a link; `key` takes the place that it leads to.
    """
    if path.is_symlink():
        raise UserError(
            f"{key}: expected a folder, got {path}, a link to {path.readlink()}; "
            f"{key}=... says where to write"
        )


def sha256(path: Path) -> str:
    """Hex digest of what a file holds."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """What an error says, in one short line of printable characters."""
    line = one_line(str(error)) or type(error).__name__
    return f"it has no {line}" if isinstance(error, KeyError) else line


def one_line(text: str) -> str:
    """The beginning of a text, printable."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."


def _no_content(path: Path) -> str | None:
    """What a file is instead of one with content of its own; None where it is one."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return None
        if not stat.S_ISREG(mode):
            return "it is a pipe or a device"
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except (OSError, ValueError):  # whoever reads it will say so
        return None
    return "it is a pointer of Git LFS, git lfs pull fetches the file" if is_pointer else None


def _state(path: Path) -> str | None:
    """What is wrong with a file whatever its format, None where nothing is."""
    try:
        if path.is_symlink() and not path.exists():
            return f"it is a link to {path.readlink()}, and nothing is there"
        if path.is_file() and path.stat().st_size == 0:
            return "it is empty"
        if path.is_file() and not os.access(path, os.R_OK):
            return "you may not read it"
    except (OSError, ValueError):  # what the error says is enough then
        return None
    return _no_content(path)
