"""ImageNet-1k and its subsets, decoded and transformed image by image (timm's transforms)."""

import os
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

from padst_exp.data.fingerprint import fingerprint
from padst_exp.data.image_files import checked_labels, numbered_classes, read_image
from padst_exp.data.shards import ShardImages, pattern_files, require_whole
from padst_exp.data.sources import (
    IMAGES,
    SHARDS,
    SPLIT_NAMES,
    Place,
    Split,
    Table,
    existing,
    load_files,
    load_hub,
    require_columns,
    split_files,
)
from padst_exp.data.task import Address, Batch, Classification
from padst_exp.errors import UserError, require
from padst_exp.files import reading
from padst_exp.messages import say
from padst_exp.seeds import preserved_rng, seed_of

Transform = Callable[[Image.Image], Tensor]


class _Source(Protocol):
    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]: ...

    def fingerprint(self) -> str: ...


class FolderImages:
    """Images in one folder per class, numbered in the order of the folders' names.

    Files and folders whose names begin with a dot are skipped.

    Raises:
        UserError: a class folder is empty, or there is none.
    """

    def __init__(self, folder: Path) -> None:
        with reading("dataset.root", folder, "class folders with images"):
            found = _ClassFolders(str(folder), is_valid_file=partial(_is_visible_image, folder))
        self.samples: list[tuple[str, int]] = found.samples
        self.classes: list[str] = found.classes
        self.folder = folder
        say(f"{folder}: {len(self.samples):,} images in {len(self.classes):,} class folders")

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path, Path(path), "RGB"), label

    def fingerprint(self) -> str:
        start = len(str(self.folder))
        return fingerprint(path[start:] for path, _ in self.samples)


class _ClassFolders(ImageFolder):  # type: ignore[misc]
    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = sorted(path.name for path in class_folders(Path(directory)))
        return names, {name: number for number, name in enumerate(names)}


def class_folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones."""
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _is_visible_image(root: Path, path: str) -> bool:
    below = Path(path).relative_to(root).parts
    return is_image_file(path) and not any(part.startswith(".") for part in below)


class TableImages:
    """Rows of a data set with columns image ({bytes, path}) and label, as the hub has them.

    Raises:
        UserError: a column is missing, or its labels are not 0, 1, ...
    """

    def __init__(self, table: Table) -> None:
        import datasets

        require_columns(table.rows, "image", "label")
        feature, labels = table.rows.features["label"], table.rows["label"][:]
        if isinstance(feature, datasets.ClassLabel):
            self.classes = list(feature.names)
            checked_labels(labels, table.source, len(self.classes))
        else:
            self.classes = numbered_classes(labels, table.source)
        self.table = Table(table.rows.select_columns(["image", "label"]), table.files)
        self.table = self.table.undecoded("image")

    def __len__(self) -> int:
        return len(self.table.rows)

    def read(self, index: int) -> tuple[Image.Image, int]:
        row = self.table.rows[index]
        content = self.table.image(row["image"], index)
        return read_image(content, Place(self.table, index), "RGB"), row["label"]

    def fingerprint(self) -> str:
        return fingerprint(np.array(self.table.rows["label"][:]))


class TrainImages(Dataset[Batch]):
    """Randomly transformed images, addressed by (epoch, index)."""

    def __init__(self, source: _Source, transform: Transform) -> None:
        self.source, self.transform = source, transform
        self.seed = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, address: Address) -> Batch:
        epoch, index = address
        image, label = self.source.read(index)
        with preserved_rng(seed_of("image", self.seed, epoch, index)):
            return self.transform(image), torch.tensor(label)

    def fingerprint(self) -> str:
        """Of the images' names, or of their labels in a table."""
        return self.source.fingerprint()


class ValidationImages(Dataset[Batch]):
    """Images under a fixed transform, addressed by index."""

    def __init__(self, source: _Source, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        image, label = self.source.read(index)
        return self.transform(image), torch.tensor(label)

    def fingerprint(self) -> str:
        """Of the images' names, or of their labels in a table."""
        return self.source.fingerprint()


class Imagenet1k(Classification):
    """ImageNet-1k (Deng et al. 2009), or any subset laid out like it.

    Args:
        root: a folder with train/ and val/ of one folder per class, with parquet files as on the
            hub, or with WebDataset shards; a brace pattern of shards; null: the hub's
            ILSVRC/imagenet-1k (accept its terms, log in).
        num_classes: must be what is found: 1000, or 100 for an ImageNet-100.
        image_size: of the crops, in pixels.
        mixup, cutmix, smoothing, objective: see `Classification`.
        repeats: repeated augmentation, copies of an image in a batch; 3 in DeiT, 1 for off.
        auto_augment: timm's policy string, e.g. rand-m9-mstd0.5-inc1, or 3a (DeiT III).
        color_jitter: strength; timm applies it without a policy, or with 3a.
        reprob: probability of random erasing.
        interpolation: timm's name; bicubic, bilinear or random.
        crop_pct: share of the resized image that the centre crop of validation keeps.
    """

    def __init__(
        self,
        *,
        root: str | None,
        num_classes: int,
        image_size: int,
        mixup: float,
        cutmix: float,
        smoothing: float,
        objective: Literal["cross_entropy", "bce"],
        repeats: int,
        auto_augment: str | None,
        color_jitter: float,
        reprob: float,
        interpolation: Literal["bicubic", "bilinear", "random"],
        crop_pct: float,
    ) -> None:
        super().__init__(
            image_size=image_size,
            channels=3,
            num_classes=num_classes,
            smoothing=smoothing,
            objective=objective,
            mixup=mixup,
            cutmix=cutmix,
        )
        require(repeats >= 1, "dataset.repeats", repeats, "at least 1, which is off")
        require(0 <= reprob <= 1, "dataset.reprob", reprob, "a probability")
        require(color_jitter >= 0, "dataset.color_jitter", color_jitter, "at least 0")
        self.repeats = repeats
        try:
            augmented = create_transform(
                image_size,
                is_training=True,
                auto_augment=auto_augment,
                color_jitter=color_jitter,
                re_prob=reprob,
                re_mode="pixel",
                interpolation=interpolation,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(
                "dataset.auto_augment: expected a policy of timm as rand-m9-mstd0.5-inc1 or 3a, or "
                f"null, got {auto_augment}"
            ) from error
        _allow_no_bits(augmented)
        plain = plain_transform(image_size, interpolation, crop_pct)
        train, validation = _source(root, "train"), _source(root, "validation")
        alone = sorted({*train.classes} ^ {*validation.classes})
        found = f"{root} ({alone[0]} is in one of them only)" if alone else root
        wanted = "the same classes in training and validation"
        require(train.classes == validation.classes, "dataset.root", found, wanted)
        count = len(train.classes)
        wanted = f"{count}, the classes of the images"
        require(count == num_classes, "dataset.num_classes", num_classes, wanted)
        self.train = TrainImages(train, augmented)
        self.validation = ValidationImages(validation, plain)
        self.preprocessing = {
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": _plain(interpolation),
            "crop_pct": crop_pct,
        }


def plain_transform(image_size: int, interpolation: str, crop_pct: float) -> Transform:
    """How an image is looked at in validation: resized, its centre cut out, normalised."""
    require(0 < crop_pct <= 1, "dataset.crop_pct", crop_pct, "a share in (0, 1]")
    transform: Transform = create_transform(
        image_size,
        interpolation=_plain(interpolation),
        crop_pct=crop_pct,
    )
    return transform


def _plain(interpolation: str) -> str:
    """How validation images are resized."""
    return "bicubic" if interpolation == "random" else interpolation


def _allow_no_bits(transform: Callable[..., object]) -> None:
    # timm's stronger policies posterize to 0 bits now and then. Pillow used to answer with a
    # black image, on which published recipes were trained; since version 13 it refuses.
    for step in getattr(transform, "transforms", ()):
        for op in [*getattr(step, "ops", ()), *chain(*getattr(step, "policy", ()))]:
            if op.aug_fn is posterize:
                op.aug_fn = _posterized


def _posterized(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _source(root: str | None, split: Split) -> FolderImages | TableImages | ShardImages:
    if root is None:
        return TableImages(load_hub("ILSVRC/imagenet-1k", name=None, split=split))
    if "{" in root and not os.path.exists(os.path.expanduser(root)):
        return ShardImages(_shards_of_pattern(root, split), split)
    folder = existing(root, "root")
    with reading("dataset.root", folder, f"a folder with {split} images"):
        folders = [path for name in sorted(SPLIT_NAMES[split]) if (path := folder / name).is_dir()]
        filled = [path for path in folders if class_folders(path)]
        # What lies deeper may be a million files.
        places = [*folder.iterdir(), *(path for each in filled for path in each.iterdir())]
    formats = (*IMAGES, *SHARDS)
    if filled:
        beside = split_files(folder, split, formats, paths=places)
        if len(filled) > 1 or beside is not None:
            names = ", ".join(map(str, [*filled, *(beside[1][:1] if beside else ())]))
            raise UserError(f"dataset.root: expected one copy of the {split} images, got {names}")
        return FolderImages(filled[0])
    found = split_files(folder, split, formats) if folder.is_dir() else None
    if folders and found is None:
        raise UserError(
            f"dataset.root: expected a folder for each class in {folders[0]}, got none "
            "(images are sorted into class folders, a file of labels is not read)"
        )
    wanted = f"train/ and val/ of class folders, or {split} parquet files or shards"
    if found is None:
        raise UserError(f"dataset.root: expected {wanted}, got {root}")
    builder, files = found
    if builder != "webdataset":
        return TableImages(load_files(folder, split, IMAGES))
    require_whole(files)
    return ShardImages(files, split)


def _shards_of_pattern(pattern: str, split: Split) -> list[str]:
    paths = pattern_files(pattern)
    top = Path(os.path.commonpath([path.parent for path in paths]))
    found = split_files(top, split, SHARDS, paths=paths)
    names = "|".join(sorted(SPLIT_NAMES[split]))
    if found is None:
        wanted = f"a brace pattern with {split} shards (names with {names})"
        raise UserError(f"dataset.root: expected {wanted}, got {pattern}")
    return found[1]
