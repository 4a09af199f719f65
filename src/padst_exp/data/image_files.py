"""Readers of two classic formats, which trust nothing in the file."""

import gzip
import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from padst_exp.errors import UserError

_PICKLE_NAMES = {
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class CifarFiles:
    """The "python version" of one of the CIFARs.

    Args:
        folder: inside of its tar.
        label: key of the labels in its files.
        train, test: names of its files.
    """

    folder: str
    label: bytes
    train: tuple[str, ...]
    test: tuple[str, ...]


CIFAR_10 = CifarFiles(
    "cifar-10-batches-py",
    b"labels",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    ("test_batch",),
)
CIFAR_100 = CifarFiles("cifar-100-python", b"fine_labels", ("train",), ("test",))


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Reads an idx file of unsigned bytes, plain or gzipped (LeCun's MNIST format).

    Raises:
        UserError: the file is not gzip, cut short, not idx, or of another number of dimensions.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"dataset.root: expected whole files, got {path} ({error})") from error
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes([0, 0, 8, ndim]):
        raise UserError(
            f"dataset.root: expected an idx file of bytes in {ndim} dimensions, got {path} "
            f"(it starts with {content[:4].hex() or 'nothing'}, not 000008{ndim:02x})"
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
    values = np.frombuffer(content, np.uint8, offset=header)
    expected = int(np.prod(shape, dtype=np.int64))
    if len(values) != expected:
        raise UserError(
            f"dataset.root: expected {expected} bytes of shape {shape} in {path}, got {len(values)}"
        )
    return values.reshape(shape)


class _Unpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        # The files were written long before numpy 2 moved its core.
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) not in _PICKLE_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a data file")
        return super().find_class(module, name)


def read_cifar(
    root: Path, name: str, files: CifarFiles = CIFAR_100
) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
    """Images `[N, 3, 32, 32]` and (fine) labels `[N]` of one file of a "python version".

    Args:
        root: the folder of the files, the one around it, or the one with its tar.
        name: of the file.
        files: which of the CIFARs.

    Returns:
        None where `root` has no such file.

    Raises:
        UserError: the file is not what it should be.
    """
    source = root / name
    try:
        content = _cifar_bytes(root, files.folder, name)
        if content is None:
            return None
        table = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        images = np.asarray(table[b"data"])
        labels = np.asarray(table[files.label], np.int64)
    except Exception as error:  # a broken pickle can raise almost anything
        raise UserError(
            f"dataset.root: expected a file of {files.folder}, got {source} "
            f"({type(error).__name__}: {error})"
        ) from error
    if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        raise UserError(
            f"dataset.root: expected uint8 [{len(labels)}, 3072] in {source}, "
            f"got {images.dtype} {list(images.shape)}"
        )
    return images.reshape(-1, 3, 32, 32), labels


def _cifar_bytes(root: Path, folder: str, name: str) -> bytes | None:
    for path in (root / name, root / folder / name):
        if path.is_file():
            return path.read_bytes()
    # The tar of CIFAR-10 is called cifar-10-python.
    tar_name = folder.replace("batches-py", "python")
    for archive in (root, root / f"{tar_name}.tar.gz", root / f"{tar_name}.tar"):
        if archive.is_file():
            with tarfile.open(archive) as tar:
                member = tar.extractfile(f"{folder}/{name}")
                return member.read() if member else None
    return None
