"""The folder where prepared data and measured decisions are kept between runs.

What is found there is trusted only as far as its digest reaches, which is one of name and content:
a file that is cut, damaged, another's or of another version of ours counts as absent, and is made
again.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from padst_exp.atomic import replacing
from padst_exp.errors import UserError
from padst_exp.files import reading

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DIGEST_SIZE = 32
T = TypeVar("T")


def cache_folder() -> Path:
    """`$PADST_CACHE`, or `~/.cache/padst_exp`. May not exist yet, nor ever be written."""
    try:
        return Path(os.environ.get("PADST_CACHE") or Path.home() / ".cache" / "padst_exp")
    except RuntimeError:  # a user without a home keeps nothing
        return Path(os.devnull, "padst_exp")


def cached(name: str, make: Callable[[], str], parse: Callable[[str], T]) -> T:
    """What `parse` makes of the text that `make` returned once.

    Args:
        name: of the file, and its folders in the cache; the digest stands in its first line.
        make: called where there is no such text yet.
        parse: reads it; where it fails with an error, what was kept is made again.
    """
    path = cache_folder() / name
    # Libraries raise almost anything.
    with contextlib.suppress(Exception):
        with reading("PADST_CACHE", path, "what was kept"):
            digest, _, text = path.read_bytes().partition(b"\n")
        if _digest(name, text).hexdigest().encode() == digest:
            return parse(text.decode())
    made = make()
    content = made.encode()
    # A home that cannot be written only costs the time of making it again.
    with contextlib.suppress(OSError), replacing(path) as file:
        file.write(_digest(name, content).hexdigest().encode() + b"\n" + content)
    return parse(made)


def cached_array(
    name: str, pieces: Callable[[], Iterable["NDArray[np.int32]"]], *, below: int
) -> "NDArray[np.int32]":
    """The concatenation of what `pieces` yielded once, mapped into memory where it can be kept.

    Args:
        name: of the file, which holds the digest after the numbers.
        pieces: makes them, one-dimensional.
        below: all numbers are from 0 on, and smaller.
    """
    import numpy as np

    path = cache_folder() / name
    found = _mapped(path, name, below)
    if found is not None:
        return found
    try:
        with replacing(path) as file:
            digest = _digest(name)
            for piece in pieces():
                content = piece.astype("<i4").tobytes()
                digest.update(content)
                file.write(content)
            file.write(digest.digest())
    except OSError:
        return np.concatenate([np.empty(0, np.int32), *pieces()])
    found = _mapped(path, name, below)
    assert found is not None
    return found


def _mapped(path: Path, name: str, below: int) -> "NDArray[np.int32] | None":
    import numpy as np

    with contextlib.suppress(UserError), reading("PADST_CACHE", path, "what was kept"):
        size = path.stat().st_size - DIGEST_SIZE
        if size < 0 or size % 4:
            return None
        with open(path, "rb") as file:
            digest = _digest(name)
            left = size
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
                numbers = np.frombuffer(block, "<u4")  # what is negative is too large
                if numbers.max() >= below:
                    return None
            if left or file.read() != digest.digest():
                return None
        if size == 0:
            return np.empty(0, np.int32)
        return np.memmap(path, "<i4", "r", shape=(size // 4,))
    return None


def _digest(name: str, content: bytes = b"") -> "hashlib._Hash":
    return hashlib.sha256(name.encode() + b"\n" + content)
