"""The folder where prepared data and measured decisions are kept between runs.

What is found there is trusted only as far as its digest reaches: a file that is cut, damaged or of
another version of ours counts as absent, and is made again.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from padst_exp.atomic import replacing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DIGEST_SIZE = 32


def cache_folder() -> Path:
    """`$PADST_CACHE`, or `~/.cache/padst_exp`. May not exist yet."""
    return Path(os.environ.get("PADST_CACHE") or Path.home() / ".cache" / "padst_exp")


def cached_text(name: str, make: Callable[[], str]) -> str:
    """The text that `make` returned once, kept as `name` with its digest in the first line."""
    path = cache_folder() / name
    with contextlib.suppress(OSError, ValueError):
        digest, _, text = path.read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() == digest:
            return text.decode()
    made = make()
    content = made.encode()
    # A home that cannot be written only costs the time of making it again.
    with contextlib.suppress(OSError), replacing(path) as file:
        file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return made


def cached_array(
    name: str, pieces: Callable[[], Iterable["NDArray[np.int32]"]]
) -> "NDArray[np.int32]":
    """The concatenation of what `pieces` yielded once, mapped into memory where it can be kept.

    Args:
        name: of the file, which holds the digest of the numbers after them.
        pieces: makes them, one-dimensional.
    """
    import numpy as np

    path = cache_folder() / name
    found = _mapped(path)
    if found is not None:
        return found
    try:
        with replacing(path) as file:
            digest = hashlib.sha256()
            for piece in pieces():
                content = piece.astype("<i4").tobytes()
                digest.update(content)
                file.write(content)
            file.write(digest.digest())
    except OSError:
        return np.concatenate([np.empty(0, np.int32), *pieces()])
    found = _mapped(path)
    assert found is not None
    return found


def _mapped(path: Path) -> "NDArray[np.int32] | None":
    import numpy as np

    with contextlib.suppress(OSError, ValueError):
        size = path.stat().st_size - DIGEST_SIZE
        if size < 0 or size % 4:
            return None
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            left = size
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
            if left or file.read() != digest.digest():
                return None
        if size == 0:
            return np.empty(0, np.int32)
        return np.memmap(path, "<i4", "r", shape=(size // 4,))
    return None
