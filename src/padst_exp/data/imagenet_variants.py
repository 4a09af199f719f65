"""Test sets for models of ImageNet's 1000 classes: V2, A, R and the labels of ReaL."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset

from padst_exp.data.fingerprint import fingerprint
from padst_exp.data.image_files import read_image
from padst_exp.data.imagenet import FolderImages, ValidationImages, class_folders, plain_transform
from padst_exp.data.sources import existing
from padst_exp.data.task import Batch, Classification
from padst_exp.errors import UserError, require
from padst_exp.files import read_text, reading
from padst_exp.messages import say

Variant = Literal["v2", "a", "r", "real"]
NUM_CLASSES, VALIDATION_IMAGES = 1000, 50_000
MOST_BYTES = 1 << 23  # of a file of labels; the published one has 400,000


class ImagenetVariant(Classification):
    """One of ImageNet's test sets, for a model of its classes in the order of their WordNet ids.

    - `v2` (Recht et al. 2019): folders 0 to 999, numbers of classes; or their WordNet ids.
    - `a` (Hendrycks et al. 2021, "natural adversarial examples") and `r` (Hendrycks et al. 2021,
      "the many faces of robustness"): folders of 200 classes each. The logits of all other
      classes are left out, from the loss too.
    - `real` (Beyer et al. 2020): the validation images with as many labels as they deserve. An
      image counts as right if the likeliest class is one of them, those without any are skipped;
      there is no loss.

    Args:
        variant: which of them.
        root: its folder; for `real` that of the validation images, sorted into folders or not, or
            the one around it, called val.
        labels: of `real`, its real.json; None takes timm's copy.
        image_size, interpolation, crop_pct: as the model was validated with in training.

    Raises:
        UserError: the folder is not laid out as the data set is.
    """

    for_training = False

    def __init__(
        self,
        *,
        variant: Variant,
        root: str,
        labels: str | None,
        image_size: int,
        interpolation: Literal["bicubic", "bilinear", "random"],
        crop_pct: float,
    ) -> None:
        super().__init__(image_size=image_size, channels=3, num_classes=NUM_CLASSES)
        transform = plain_transform(image_size, interpolation, crop_pct)
        folder = existing(root, "root")
        self.classes: Tensor | None = None
        if variant == "real":
            self.validation: Dataset[Batch] = _RelabelledImages(
                *_relabelled(folder, labels), transform
            )
        else:
            images = FolderImages(folder)
            numbers = _numbers(images.classes, variant, folder)
            if len(numbers) < NUM_CLASSES:
                self.classes = torch.tensor(sorted(numbers))
            ranks = {number: rank for rank, number in enumerate(sorted(numbers))}
            images.samples = [(path, ranks[numbers[label]]) for path, label in images.samples]
            self.validation = ValidationImages(images, transform)
        self.train = self.validation  # nothing is trained on it

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The sums of `Classification`, over the classes that the set has.

        Targets are int64 `[B]`, or bool `[B, 1000]` where an image has several labels.
        """
        if self.classes is not None:
            logits = logits[:, self.classes.to(logits.device)]
        if targets.ndim == 1:
            return super().metrics(logits, targets)
        hits = targets.gather(1, logits.topk(5).indices)
        count = torch.tensor(len(logits), dtype=torch.float64, device=logits.device)
        return {"top1": hits[:, 0].double().sum(), "top5": hits.any(1).double().sum()} | {
            "count": count
        }

    def summarize(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Mean "loss" in nats where there is one, "top1" and "top5" in percent."""
        known = super().summarize({"loss": 0.0, **sums})
        return {key: value for key, value in known.items() if key in sums}


class _RelabelledImages(Dataset[Batch]):
    """Images addressed by index, with bool `[1000]`: which classes they show."""

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[Sequence[int]], transform: object
    ) -> None:
        assert callable(transform)
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch:
        path = str(self.paths[index])
        shown = torch.zeros(NUM_CLASSES, dtype=torch.bool)
        shown[list(self.labels[index])] = True
        return self.transform(read_image(path, path, "RGB")), shown

    def fingerprint(self) -> str:
        """Of the images' names."""
        return fingerprint(path.name for path in self.paths)


def _numbers(folders: Sequence[str], variant: Variant, root: Path) -> list[int]:
    """Which of the 1000 classes each folder is."""
    ids = ImageNetInfo().label_names()
    wanted = ids if variant == "v2" else _lines(f"imagenet_{variant}_synsets.txt")
    by_name = {name: ids.index(name) for name in wanted}
    if variant == "v2" and folders[0].isdigit():
        by_name = {str(number): number for number in range(NUM_CLASSES)}
    odd = sorted(set(folders) ^ by_name.keys())
    what = "folders 0 to 999, or WordNet ids" if variant == "v2" else "folders of its WordNet ids"
    if odd:
        found = "one called" if odd[0] in folders else "none called"
        raise UserError(
            f"dataset.root: expected the {len(by_name)} {what} of variant={variant}, got {root} "
            f"with {found} {odd[0]} ({len(odd)} differ)"
        )
    return [by_name[name] for name in folders]


def _lines(name: str) -> list[str]:
    return (resources.files("timm.data") / "_info" / name).read_text().split()


def _relabelled(root: Path, labels: str | None) -> tuple[list[Path], list[list[int]]]:
    """Images that have labels, and these."""
    if labels is None:
        info = resources.files("timm.data") / "_info" / "imagenet_real_labels.json"
        known = json.loads(info.read_text())
    else:
        file = Path(labels).expanduser()
        with reading("labels", file, "real.json, a list of labels for each validation image"):
            known = json.loads(read_text("labels", file, "real.json", most=MOST_BYTES))
            for number, each in enumerate(known):
                if not all(type(label) is int and 0 <= label < NUM_CLASSES for label in each):
                    raise ValueError(f"entry {number} is no list of classes: {each}")
            if len(known) != VALIDATION_IMAGES:
                raise ValueError(f"it has {len(known)} entries, not {VALIDATION_IMAGES}")
    folder = next((root / name for name in ("val", "validation") if (root / name).is_dir()), root)
    places = [folder, *sorted(class_folders(folder))]
    paths = [path for place in places for path in sorted(place.iterdir()) if path.is_file()]
    kept: list[Path] = []
    given: list[list[int]] = []
    for path in paths:
        named = re.fullmatch(r"ILSVRC2012_val_(\d{8})(?:_n\d{8})?", path.stem)
        if named is None:
            continue
        wanted = f"names up to ILSVRC2012_val_{VALIDATION_IMAGES:08}"
        inside = 1 <= int(named[1]) <= VALIDATION_IMAGES
        require(inside, "dataset.root", path, wanted)
        if shown := known[int(named[1]) - 1]:
            kept.append(path)
            given.append(shown)
    wanted = "validation images called ILSVRC2012_val_00000001.JPEG and so on"
    require(bool(kept), "dataset.root", f"none in {folder}", wanted)
    say(f"{folder}: {len(kept):,} images with labels")
    return kept, given
