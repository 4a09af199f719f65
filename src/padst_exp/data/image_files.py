"""Readers of single images and of two classic formats, which trust nothing in the file."""

import gzip
import io
import pickle
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from padst_exp.errors import UserError, require
from padst_exp.files import reading

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


def read_image(content: str | bytes, name: object, mode: Literal["L", "RGB"]) -> Image.Image:
    """Decodes an image; 16-bit grey levels keep their order, in 8 bits.

    Args:
        content: path of a file, or what is in it.
        name: where the image is, printed in messages.
        mode: Pillow's; grey or colour.

    Raises:
        UserError: it is no whole image of integer pixels, or one of more than 178 million.
    """
    with reading("dataset.root", name, "an image"), warnings.catch_warnings():
        # Some of ImageNet's files carry broken EXIF, which nothing here reads.
        warnings.filterwarnings("ignore", module="PIL")
        image: Image.Image = Image.open(
            content if isinstance(content, str) else io.BytesIO(content)
        )
        if image.mode.startswith("I"):  # Pillow itself would clip at 255
            levels = np.asarray(image).astype(np.int64)
            if levels.min() < 0 or levels.max() > 65535:
                raise ValueError(
                    f"its grey levels are {levels.min()} to {levels.max()}, not 16-bit"
                )
            image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("its grey levels are floats, whose range nothing tells")
        return image.convert(mode)


def checked_labels(values: object, name: str, num_classes: int) -> NDArray[np.int64]:
    """Labels as int64 `[N]`.

    Args:
        values: a list or an array.
        name: what they belong to, for messages.
        num_classes: of the data set.

    Raises:
        UserError: there is none, or one is no integer from 0 to `num_classes` - 1.
    """
    wanted = f"labels from 0 to {num_classes - 1} in {name}"
    with reading("dataset.root", "others", wanted):
        labels = np.asarray(values)
    require(labels.size > 0, "dataset.root", "none", wanted)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        odd = (x for x in labels.ravel().tolist() if type(x) is not int)
        raise UserError(f"dataset.root: expected {wanted}, got {next(odd, labels.tolist()[0])}")
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    found = f"{labels[bad[0]]} in row {bad[0]}" if len(bad) else ""
    require(len(bad) == 0, "dataset.root", found, wanted)
    return labels.astype(np.int64)


def numbered_classes(labels: object, source: str) -> list[str]:
    """The classes of labels without names, by their numbers.

    Args:
        labels: of all samples, a list or an array.
        source: where they are, for messages.

    Raises:
        UserError: they are not 0, 1, ... without gaps.
    """
    seen = set(checked_labels(labels, source, 2**31).tolist())
    found = f"{len(seen)} from {min(seen)} to {max(seen)} in {source}"
    require(max(seen) < len(seen), "dataset.root", found, "labels 0, 1, ... without gaps")
    return [str(label) for label in sorted(seen)]


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Reads an idx file of unsigned bytes, plain or gzipped (LeCun's MNIST format).

    Raises:
        UserError: the file is not gzip, cut short, not idx, or of another number of dimensions.
    """
    with reading("dataset.root", path, "a whole file"):
        content = path.read_bytes()
        if path.suffix == ".gz" and content:
            content = gzip.decompress(content)
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
) -> tuple[NDArray[np.uint8], object] | None:
    """Images `[N, 3, 32, 32]` and (fine) labels, unchecked, of one file of a "python version".

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
    with reading("dataset.root", source, f"a file of {files.folder}"):
        content = _cifar_bytes(root, files.folder, name)
        if content is None:
            return None
        table = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = np.asarray(table[b"data"]), table[files.label]
        len(labels)
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
