"""Digits (inside scikit-learn), Fashion-MNIST and the CIFARs, held in memory."""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from padst_exp.data.image_files import (
    CIFAR_10,
    CIFAR_100,
    CifarFiles,
    checked_labels,
    read_cifar,
    read_idx,
    read_image,
)
from padst_exp.data.images import AugmentedImages, TensorImages
from padst_exp.data.sources import (
    IMAGES,
    Place,
    Table,
    existing,
    load_files,
    load_hub,
    require_columns,
    split_files,
)
from padst_exp.data.task import Classification
from padst_exp.errors import UserError, require

Arrays = tuple[NDArray[np.uint8], object]
"""Images `[N, C, H, W]` and their labels, unchecked."""

Split = Literal["test", "held_out"]
"""What to evaluate on: test images, or a tenth of the training images, which then train nothing."""

FASHION_MNIST_SYSTEM = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


class _SmallImages(Classification):
    def _hold(
        self,
        train: Arrays,
        validation: Arrays,
        *,
        split: Split,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shift: int,
        flip: bool,
    ) -> None:
        size, channels = self.model_shape["image_size"], self.model_shape["channels"]
        require(0 <= shift < size, "dataset.shift", shift, f"0 or a few of {size} pixels")
        if split == "held_out":
            train, validation = _parted(train)
        sets = []
        for name, (images, values) in (("training", train), ("validation", validation)):
            labels = checked_labels(values, f"the {name} split", self.model_shape["num_classes"])
            shape = (len(labels), channels, size, size)
            found = f"shape {list(images.shape)}"
            require(images.shape == shape, "dataset.root", found, f"{name} images {list(shape)}")
            sets.append(TensorImages(torch.tensor(images), torch.tensor(labels), mean, std))
        self.train = AugmentedImages(sets[0], shift=shift, flip=flip)
        self.validation = sets[1]


class Digits(_SmallImages):
    """Scikit-learn's 1,797 handwritten digits: 8x8, 1 channel, 10 classes, no download.

    1,437 are for training and 360, stratified, for validation: the same in every run.

    Args:
        split: to evaluate on: those 360, or a tenth of the others.
        shift: training images move by up to so many pixels each way.
    """

    def __init__(
        self,
        *,
        split: Split,
        shift: int,
        smoothing: float,
        objective: Literal["cross_entropy", "bce"],
    ) -> None:
        super().__init__(
            image_size=8, channels=1, num_classes=10, smoothing=smoothing, objective=objective
        )
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = digits.images.astype(np.uint8)[:, None]
        labels = digits.target.astype(np.int64)
        train, validation = train_test_split(
            np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
        )
        self._hold(
            (images[train], labels[train]),
            (images[validation], labels[validation]),
            split=split,
            mean=(4.884,),  # pixels are in 0..16
            std=(6.017,),
            shift=shift,
            flip=False,
        )


class FashionMnist(_SmallImages):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 images, 28x28, 1 channel, 10 classes.

    Args:
        root: folder with the four idx files, gzipped or not; null: Debian's
            dataset-fashion-mnist if installed, else the hub's zalando-datasets/fashion_mnist.
        split: to evaluate on: the test images, or a tenth of the training images.
        shift, flip: augmentation of training images.
    """

    def __init__(
        self,
        *,
        root: str | None,
        split: Split,
        shift: int,
        flip: bool,
        smoothing: float,
        objective: Literal["cross_entropy", "bce"],
        mixup: float,
        cutmix: float,
    ) -> None:
        super().__init__(
            image_size=28,
            channels=1,
            num_classes=10,
            smoothing=smoothing,
            objective=objective,
            mixup=mixup,
            cutmix=cutmix,
        )
        if root is None and FASHION_MNIST_SYSTEM.is_dir():
            root = str(FASHION_MNIST_SYSTEM)
        if root is not None:
            folder = existing(root, "root")
            train, validation = _idx_pair(folder, "train"), _idx_pair(folder, "t10k")
        else:
            hub = "zalando-datasets/fashion_mnist"
            train, validation = (
                decoded(load_hub(hub, name=None, split=split), "image", "label", "L")
                for split in ("train", "test")
            )
        self._hold(
            train, validation, split=split, mean=(72.94,), std=(90.02,), shift=shift, flip=flip
        )


class Cifar100(_SmallImages):
    """CIFAR-100 (Krizhevsky 2009): 50,000 and 10,000 images, 32x32, 3 channels, 100 fine classes.

    Args:
        root: the folder or tar `cifar-100-python` of the "python version", or a folder with the
            hub's parquet files; null: the hub's uoft-cs/cifar100.
        split: to evaluate on: the test images, or a tenth of the training images.
        shift, flip: augmentation of training images.
    """

    files: ClassVar[CifarFiles] = CIFAR_100
    hub: ClassVar[tuple[str, str]] = ("uoft-cs/cifar100", "fine_label")
    classes: ClassVar[int] = 100
    mean: ClassVar[tuple[float, ...]] = (129.30, 124.07, 112.43)
    std: ClassVar[tuple[float, ...]] = (68.17, 65.39, 70.42)

    def __init__(
        self,
        *,
        root: str | None,
        split: Split,
        shift: int,
        flip: bool,
        smoothing: float,
        objective: Literal["cross_entropy", "bce"],
        mixup: float,
        cutmix: float,
    ) -> None:
        super().__init__(
            image_size=32,
            channels=3,
            num_classes=self.classes,
            smoothing=smoothing,
            objective=objective,
            mixup=mixup,
            cutmix=cutmix,
        )
        self._hold(
            self._read(root, "train", self.files.train),
            self._read(root, "test", self.files.test),
            split=split,
            mean=self.mean,
            std=self.std,
            shift=shift,
            flip=flip,
        )

    def _read(
        self, root: str | None, split: Literal["train", "test"], names: tuple[str, ...]
    ) -> Arrays:
        repository, label = self.hub
        if root is None:
            return decoded(load_hub(repository, name=None, split=split), "img", label, "RGB")
        folder = existing(root, "root")
        found = [read_cifar(folder, name, self.files) for name in names]
        parts = [arrays for arrays in found if arrays is not None]
        if len(parts) == len(names):
            images, labels = zip(*parts, strict=True)
            return np.concatenate(images), [label for part in labels for label in part]
        wanted = f"{self.files.folder} (folder or .tar.gz) or {split} parquet files"
        has_files = folder.is_dir() and split_files(folder, split, IMAGES) is not None
        require(has_files, "dataset.root", root, wanted)
        return decoded(load_files(folder, split, IMAGES), "img", label, "RGB")


class Cifar10(Cifar100):
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images, 32x32, 3 channels, 10 classes.

    Args:
        root: the folder `cifar-10-batches-py` of the "python version" or its tar, or a folder with
            the hub's parquet files; null: the hub's uoft-cs/cifar10.
        split: to evaluate on: the test images, or a tenth of the training images.
        shift, flip: augmentation of training images.
    """

    files = CIFAR_10
    hub = ("uoft-cs/cifar10", "label")
    classes = 10
    mean = (125.31, 122.95, 113.87)
    std = (62.99, 62.09, 66.70)


def _parted(train: Arrays) -> tuple[Arrays, Arrays]:
    """Nine tenths and one of the training images, the same at every call."""
    images, labels = train[0], np.asarray(train[1])
    few = f"held_out of {len(images)} training images"
    require(len(images) >= 10, "dataset.split", few, "test, or ten images at least")
    order = np.random.default_rng(0).permutation(len(images))
    held, kept = np.sort(order[: len(order) // 10]), np.sort(order[len(order) // 10 :])
    return (images[kept], labels[kept]), (images[held], labels[held])


def _idx_pair(folder: Path, prefix: str) -> Arrays:
    images = read_idx(_idx_file(folder, f"{prefix}-images-idx3-ubyte"), 3)
    labels = read_idx(_idx_file(folder, f"{prefix}-labels-idx1-ubyte"), 1)
    return images[:, None], labels


def _idx_file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UserError(f"dataset.root: expected a folder with {name}, plain or .gz, got {folder}")


def decoded(table: Table, image: str, label: str, mode: Literal["L", "RGB"]) -> Arrays:
    """Decodes rows of equally large images into uint8 `[N, C, H, W]`, with their labels.

    Args:
        table: with columns `image` ({bytes, path}) and `label`.
        mode: Pillow's; grey or colour.

    Raises:
        UserError: a column is missing or an image cannot be decoded.
    """
    require_columns(table.rows, image, label)
    cells = table.undecoded(image).rows[image]
    images = [
        np.array(read_image(table.image(cell, index), Place(table, index), mode))
        for index, cell in enumerate(cells)
    ]
    shapes = {pixels.shape for pixels in images}
    require(len(shapes) == 1, "dataset.root", f"{len(shapes)} sizes", "images of one size")
    stacked = np.stack(images)
    stacked = stacked[:, None] if mode == "L" else stacked.transpose(0, 3, 1, 2)
    return stacked, table.rows[label][:]
