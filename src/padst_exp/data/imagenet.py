"""ImageNet-1k and its subsets, decoded and transformed image by image (timm's transforms)."""

import io
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from padst_exp.data.sources import (
    SPLIT_NAMES,
    Split,
    existing,
    first_line,
    load_files,
    load_hub,
    require_columns,
    split_files,
)
from padst_exp.data.task import Address, Batch, Classification
from padst_exp.errors import UserError, require
from padst_exp.seeds import preserved_rng, seed_of

if TYPE_CHECKING:
    import datasets

Transform = Callable[[Image.Image], Tensor]


class _Source(Protocol):
    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]: ...


class FolderImages:
    """Images in one folder per class, numbered in the order of the folders' names.

    Raises:
        UserError: a class folder is empty, or there is none.
    """

    def __init__(self, folder: Path) -> None:
        from torchvision.datasets import ImageFolder

        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise UserError(
                f"dataset.root: expected class folders, got {folder} ({first_line(error)})"
            ) from error
        self.samples: list[tuple[str, int]] = found.samples
        self.classes: list[str] = found.classes

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return _opened(path, path), label


class TableImages:
    """Rows of a data set with columns image ({bytes, path}) and label, as the hub has them.

    Raises:
        UserError: a column is missing.
    """

    def __init__(self, rows: "datasets.Dataset") -> None:
        import datasets

        require_columns(rows, "image", "label")
        feature = rows.features["label"]
        if isinstance(feature, datasets.ClassLabel):
            self.classes = list(feature.names)
        else:
            labels = sorted(rows.unique("label"))
            found = f"{len(labels)} from {labels[0]} to {labels[-1]}"
            require(labels == list(range(len(labels))), "dataset.root", found, "labels 0, 1, ...")
            self.classes = [str(label) for label in labels]
        self.rows = rows.select_columns(["image", "label"]).cast_column(
            "image", datasets.Image(decode=False)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        return _opened(io.BytesIO(row["image"]["bytes"]), f"row {index}"), row["label"]


def _opened(source: str | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Some of ImageNet's files carry broken EXIF, which nothing here reads.
            warnings.filterwarnings("ignore", module="PIL")
            return Image.open(source).convert("RGB")
    except OSError as error:
        raise UserError(f"dataset.root: expected images, got {name} ({error})") from error


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


class ValidationImages(Dataset[Batch]):
    """Images under a fixed transform, addressed by index."""

    def __init__(self, source: _Source, transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Batch:
        image, label = self.source.read(index)
        return self.transform(image), torch.tensor(label)


class Imagenet1k(Classification):
    """ImageNet-1k (Deng et al. 2009), or any subset laid out like it.

    Args:
        root: a folder with train/ and val/ of one folder per class, or with parquet files as on
            the hub; null: the hub's ILSVRC/imagenet-1k (accept its terms, log in).
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
        require(0 < crop_pct <= 1, "dataset.crop_pct", crop_pct, "a share in (0, 1]")
        require(color_jitter >= 0, "dataset.color_jitter", color_jitter, "at least 0")
        self.repeats = repeats
        from timm.data.transforms_factory import create_transform

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
        plain = create_transform(
            image_size,
            interpolation="bicubic" if interpolation == "random" else interpolation,
            crop_pct=crop_pct,
        )
        train, validation = _source(root, "train"), _source(root, "validation")
        for name, source in (("training", train), ("validation", validation)):
            count = len(source.classes)
            wanted = f"{count}, the classes of the {name} images"
            require(count == num_classes, "dataset.num_classes", num_classes, wanted)
        alike = train.classes == validation.classes
        require(alike, "dataset.root", root, "the same classes in training and validation")
        self.train = TrainImages(train, augmented)
        self.validation = ValidationImages(validation, plain)


def _allow_no_bits(transform: Callable[..., object]) -> None:
    # timm's stronger policies posterize to 0 bits now and then. Pillow used to answer with a
    # black image, on which published recipes were trained; since version 13 it refuses.
    from timm.data.auto_augment import posterize

    def posterized(image: Image.Image, bits: int, **unused: object) -> Image.Image:
        return posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)

    for step in getattr(transform, "transforms", ()):
        for op in [*getattr(step, "ops", ()), *chain(*getattr(step, "policy", ()))]:
            if op.aug_fn is posterize:
                op.aug_fn = posterized


def _source(root: str | None, split: Split) -> FolderImages | TableImages:
    if root is None:
        return TableImages(load_hub("ILSVRC/imagenet-1k", name=None, split=split))
    folder = existing(root, "root")
    for name in sorted(SPLIT_NAMES[split]):
        split_folder = folder / name
        if split_folder.is_dir() and any(child.is_dir() for child in split_folder.iterdir()):
            return FolderImages(split_folder)
    wanted = f"train/ and val/ of class folders, or {split} parquet files"
    has_files = folder.is_dir() and split_files(folder, split) is not None
    require(has_files, "dataset.root", root, wanted)
    return TableImages(load_files(folder, split))
