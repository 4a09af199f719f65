"""Images in WebDataset shards: tar files that hold key.jpg with key.cls or key.json beside it.

Such shards are made to be read in sequence, and then where a reader stands depends on how many
workers and processes share them. Here their members are listed once and read where they lie, so
that shards are a data set like any other: shuffled as a whole, resumed exactly.
"""

import contextlib
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from padst_exp.cache import cached_array
from padst_exp.data.fingerprint import fingerprint
from padst_exp.data.image_files import numbered_classes, read_image
from padst_exp.errors import require, require_installed
from padst_exp.files import read_text, reading
from padst_exp.messages import say

WANTED = "a WebDataset shard, uncompressed, of key.jpg with key.cls or key.json (label)"
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
MOST_IMAGE, MOST_LABEL, MOST_INFO = 1 << 28, 1 << 20, 1 << 24  # bytes
MOST_SHARDS, MOST_DIGITS = 1 << 17, 6  # in a pattern
COLUMNS = 4
"""Of the list of members, int32: number of the shard, its block of 512 bytes, bytes, label."""


class ShardImages:
    """The images of a split's shards, in their order.

    Args:
        files: the shards.
        split: its name, for messages.

    Raises:
        UserError: one is no such shard, is cut, or has members that are no plain files; labels are
            not 0, 1, ... without gaps.
    """

    def __init__(self, files: Sequence[str], split: str) -> None:
        self.files = tuple(files)
        self.members = _members(self.files)
        source = f"the shards of {self.files[0]}"
        self.classes = numbered_classes(self.members[:, 3], source)
        say(
            f"{split}: {len(files)} shards, {len(self):,} images in {len(self.classes):,} classes, "
            f"from {self.files[0]}"
        )

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> tuple[Image.Image, int]:
        shard, block, size, label = self.members[index].tolist()
        path = Path(self.files[shard])
        with reading("dataset.root", path, WANTED), open(path, "rb", buffering=0) as file:
            file.seek(block * tarfile.BLOCKSIZE)
            content = file.read(size)
        return read_image(content, _Member(path, block), "RGB"), label

    def fingerprint(self) -> str:
        return fingerprint(self.members[:, 2], self.members[:, 3])


@dataclass(frozen=True)
class _Member:
    """Names a member of a shard, looked up when it is printed."""

    shard: Path
    block: int

    def __str__(self) -> str:
        place = self.block * tarfile.BLOCKSIZE
        with contextlib.suppress(Exception), tarfile.open(self.shard, "r:") as tar:
            return next(f"{m.name} in {self.shard}" for m in tar if m.offset_data == place)
        return f"byte {place} of {self.shard}"


def pattern_files(pattern: str) -> list[Path]:
    """The files of a brace pattern, as imagenet-{train-{0000..1023},val-{00..63}}.tar.

    Raises:
        UserError: it is none, stands for very many files, or one of them is missing.
    """
    require_installed("braceexpand", "dataset.root", "a brace pattern", "webdataset")
    from braceexpand import braceexpand

    with reading("dataset.root", pattern, "a brace pattern of shards"):
        if re.search(rf"\d{{{MOST_DIGITS + 1}}}", "".join(re.findall(r"\{.*\}", pattern))):
            raise ValueError(f"it has a number of more than {MOST_DIGITS} digits")
        paths = [Path(path).expanduser() for path in islice(braceexpand(pattern), MOST_SHARDS + 1)]
        if len(paths) > MOST_SHARDS:
            raise ValueError(f"it stands for more than {MOST_SHARDS} files")
    for path in paths:
        require(path.is_file(), "dataset.root", f"{path}, which is missing", f"files as {pattern}")
    return paths


def require_whole(files: Sequence[str]) -> None:
    """Raise a `UserError` if timm's _info.json beside the shards lists more of them."""
    info = Path(files[0]).parent / "_info.json"
    if not info.is_file():
        return
    with reading("dataset.root", info, "timm's description of shards"):
        text = read_text("dataset.root", info, "timm's description of shards", most=MOST_INFO)
        listed = [set(map(str, each["filenames"])) for each in json.loads(text)["splits"].values()]
    here = {Path(file).name for file in files}
    for names in listed:
        missing = sorted(names - here) if names & here else []
        found = f"{len(names) - len(missing)} of them, without {', '.join(missing[:3])}"
        require(not missing, "dataset.root", found, f"the {len(names)} shards that {info} lists")


def _members(files: Sequence[str]) -> NDArray[np.int32]:
    """Where the images lie, int32 `[N, COLUMNS]`, listed once and kept."""
    states = []
    for file in files:
        with reading("dataset.root", Path(file), WANTED):
            state = Path(file).stat()
            states.append(f"{Path(file).resolve()} {state.st_size} {state.st_mtime_ns}")
    name = f"shards-{fingerprint('members 1', states)}"

    def pieces() -> Iterator[NDArray[np.int32]]:
        with tqdm(files, "listing", unit=" shards", leave=False) as progress:
            for number, file in enumerate(progress):
                yield np.array([*_listed(number, Path(file))], np.int32).reshape(-1)

    numbers = cached_array(name, pieces, below=2**31 - 1)
    require(len(numbers) > 0, "dataset.root", f"none in {files[0]}", "images in the shards")
    return numbers.reshape(-1, COLUMNS)


def _listed(number: int, path: Path) -> Iterator[tuple[int, int, int, int]]:
    """The rows of one shard."""
    with reading("dataset.root", path, WANTED), open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise ValueError("it is compressed, gunzip it: images in it cannot be found by place")
        file.seek(0)
        key, fields = "", dict[str, tarfile.TarInfo]()
        for member in _checked(file):
            its_key, suffix = _key(member.name)
            if not suffix:  # no part of a sample
                continue
            if its_key != key and fields:
                yield number, *_row(file, key, fields)
                fields = {}
            if suffix in fields:
                raise ValueError(f"it has two members {member.name}")
            key, fields[suffix] = its_key, member
        if fields:
            yield number, *_row(file, key, fields)


def _checked(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members that are visible files; all others are folders, or refused."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep all that it has seen
            parts = PurePosixPath(member.name).parts
            if member.name.startswith("/") or ".." in parts:
                raise ValueError(f"its member {member.name} leads out of it")
            if member.isdir():
                continue
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            if not plain or member.size < 0:
                raise ValueError(f"its member {member.name} is a link, a device, or no plain file")
            if not any(part.startswith((".", "__")) for part in parts):
                yield member
        # tarfile takes a damaged header for the end, and does not miss one.
        file.seek(tar.offset)
        rest = file.read(MOST_LABEL)
        if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
            raise ValueError(f"it is cut or damaged at byte {tar.offset}")


def _key(name: str) -> tuple[str, str]:
    """What stands before the first dot of the last part of a name, and what after it."""
    folder, _, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return f"{folder}/{stem}", suffix.lower()


def _row(file: BinaryIO, key: str, fields: dict[str, tarfile.TarInfo]) -> tuple[int, int, int]:
    """Block, bytes and label of a sample's image."""
    images = [member for suffix, member in fields.items() if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise ValueError(f"its sample {key.strip('/')} has {len(images)} images")
    (image,) = images
    if not 0 < image.size <= MOST_IMAGE:
        raise ValueError(f"its member {image.name} has {image.size} bytes")
    return image.offset_data // tarfile.BLOCKSIZE, image.size, _label(file, key, fields)


def _label(file: BinaryIO, key: str, fields: dict[str, tarfile.TarInfo]) -> int:
    member = fields.get("cls") or fields.get("json")
    if member is None:
        raise ValueError(f"its sample {key.strip('/')} has no label")
    if member.size > MOST_LABEL:
        raise ValueError(f"its member {member.name} has {member.size} bytes")
    file.seek(member.offset_data)
    content = file.read(member.size)
    if "cls" in fields:
        label = int(content) if re.fullmatch(rb"\s*\d{1,9}\s*", content) else None
    else:
        known = json.loads(content)
        label = known.get("label") if isinstance(known, dict) else None
    if type(label) is not int or not 0 <= label < 10**9:
        raise ValueError(f"its member {member.name} has no label from 0 on")
    return label
