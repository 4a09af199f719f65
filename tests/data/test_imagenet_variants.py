"""ImageNet's other test sets, on files made here that are laid out like them."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from from_yaml import asked
from hostile import trained_run
from padst_exp.data.imagenet_variants import ImagenetVariant, Variant
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.evaluate import EvaluateSchema, evaluate
from padst_exp.restore import restore

IDS = ImageNetInfo().label_names()
SIZE = 16


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PICTURES = [picture(seed) for seed in range(40)]


def written(root: Path, names: Mapping[str, int]) -> Path:
    """A folder for each class, with one image."""
    for name, number in names.items():
        (root / name).mkdir(parents=True)
        (root / name / f"{number}.png").write_bytes(PICTURES[number % len(PICTURES)])
    return root


def subset(variant: str) -> dict[str, int]:
    import timm

    folder = Path(timm.__file__).parent / "data" / "_info"
    ids = (folder / f"imagenet_{variant}_synsets.txt").read_text().split()
    numbers = (folder / f"imagenet_{variant}_indices.txt").read_text().split()
    return dict(zip(ids, map(int, numbers), strict=True))


def task(variant: Variant, root: Path, labels: Path | None = None) -> ImagenetVariant:
    return ImagenetVariant(
        variant=variant,
        root=str(root),
        labels=None if labels is None else str(labels),
        image_size=SIZE,
        interpolation="bicubic",
        crop_pct=0.875,
    )


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each variant."""
    root = tmp_path_factory.mktemp("variants")
    numbers = {str(number): number for number in range(1000)}
    found = {"v2": written(root / "v2", numbers)}
    for name in ("a", "r"):
        found[name] = written(root / name, subset(name))
    flat = root / "real" / "val"
    flat.mkdir(parents=True)
    for number in range(1, 8):
        (flat / f"ILSVRC2012_val_{number:08}.JPEG").write_bytes(PICTURES[number])
    (flat / "n01440764").mkdir()
    (flat / "n01440764" / "ILSVRC2012_val_00000009.JPEG").write_bytes(PICTURES[9])
    (flat / "notes.txt").write_text("no image")
    found["real"] = root / "real"
    return found


def real_labels(folder: Path, first: list[list[int]]) -> Path:
    path = folder / "real.json"
    path.write_text(json.dumps(first + [[0]] * (50_000 - len(first))))
    return path


def test_folders_of_v2_are_numbers_and_no_words(roots: dict[str, Path]) -> None:
    made = task("v2", roots["v2"])
    images = made.validation.source  # type: ignore[attr-defined]
    assert all(int(Path(path).parent.name) == label for path, label in images.samples)
    assert len(images) == 1000 and made.classes is None


@pytest.mark.parametrize("variant", ["a", "r"])
def test_logits_of_other_classes_count_for_nothing(
    roots: dict[str, Path], variant: Variant
) -> None:
    made, numbers = task(variant, roots[variant]), subset(variant)
    images = made.validation.source  # type: ignore[attr-defined]
    assert made.classes is not None and len(made.classes) == 200
    for path, label in images.samples:
        assert int(made.classes[label]) == numbers[Path(path).parent.name]
        assert IDS[int(made.classes[label])] == Path(path).parent.name
    targets = torch.arange(0, 200, 4)
    logits = torch.randn(50, 1000)
    logits[torch.arange(50), made.classes[targets]] += 2
    outside = torch.ones(1000, dtype=torch.bool)
    outside[made.classes] = False
    masked = logits.masked_fill(outside, -torch.inf)
    labels = made.classes[targets]
    sums = made.metrics(logits + 100 * outside, targets)
    assert float(sums["top1"]) == float((masked.argmax(1) == labels).sum())
    hits = (masked.topk(5).indices == labels[:, None]).any(1)
    assert float(sums["top5"]) == float(hits.sum())
    loss = torch.nn.functional.cross_entropy(masked, labels, reduction="sum")
    assert float(sums["loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_any_of_the_real_labels_is_right(roots: dict[str, Path], tmp_path: Path) -> None:
    labels = real_labels(tmp_path, [[3, 5], [], [7], [1, 2, 999]])
    made = task("real", roots["real"], labels)
    names = [path.name[-13:-5] for path in made.validation.paths]  # type: ignore[attr-defined]
    assert names == [f"{number:08}" for number in (1, 3, 4, 5, 6, 7, 9)]
    targets = torch.stack([made.validation[index][1] for index in range(3)])
    assert [row.nonzero().flatten().tolist() for row in targets] == [[3, 5], [7], [1, 2, 999]]
    logits = torch.zeros(3, 1000)
    logits[0, 5] = logits[1, 6] = logits[2, 999] = 2.0
    logits[1, 7] = 1.0
    result = made.summarize(made.metrics(logits, targets))
    assert result == {"top1": pytest.approx(200 / 3), "top5": 100.0}


def test_without_a_file_the_published_labels_are_taken(roots: dict[str, Path]) -> None:
    made = task("real", roots["real"])
    # Those of the authors' real.json begin so: the first image has none.
    assert made.validation.labels[:2] == [[970, 795], [230, 231]]  # type: ignore[attr-defined]
    assert made.validation.paths[0].stem.endswith("2")  # type: ignore[attr-defined]


def test_what_is_not_laid_out_alike_is_one_line(roots: dict[str, Path], tmp_path: Path) -> None:
    some = written(tmp_path / "some", {"0": 0, "1": 1})
    other = written(tmp_path / "other", {**subset("a"), "n00000000": 0})
    short = tmp_path / "short.json"
    short.write_text("[[1], [2]]")
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps([[1000]] + [[0]] * 49_999))
    (tmp_path / "empty").mkdir()
    far = tmp_path / "far"
    far.mkdir()
    (far / "ILSVRC2012_val_00050001.JPEG").write_bytes(PICTURES[0])
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("v2", some), "expected the 1000 folders 0 to 999, or WordNet ids of variant=v2, got"),
        (("a", roots["r"]), "expected the 200 folders of its WordNet ids of variant=a, got"),
        (("a", other), f"got {other} with one called n00000000 (1 differ)"),
        (("r", tmp_path / "none"), "dataset.root: expected an existing file or folder, got"),
        (("real", tmp_path / "empty"), "expected validation images called ILSVRC2012_val_0000000"),
        (("real", far), "expected names up to ILSVRC2012_val_00050000, got"),
        (("real", roots["real"], short), "labels: expected real.json, a list of labels for each"),
        (("real", roots["real"], odd), "entry 0 is no list of classes: [1000]"),
        (("real", roots["real"], tmp_path / "none.json"), "there is no such file"),
    ]
    for arguments, line in cases:
        with pytest.raises(UserError) as caught:
            task(*arguments)
        assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_image_is_one_line(tmp_path: Path) -> None:
    root = written(tmp_path, subset("a"))
    (root / "n01498041" / "6.png").write_bytes(PICTURES[0][:50])
    made = task("a", root)
    with pytest.raises(UserError, match=r"dataset\.root: expected an image, got .*6\.png"):
        _ = [made.validation[index] for index in range(3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on an ImageNet of one image per class."""
    folder = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "val"):
        written(folder / split, {name: number for number, name in enumerate(IDS)})
    small = ["dataset.mixup=0", "dataset.cutmix=0", "dataset.auto_augment=null"]
    place = [f"dataset.root={folder}", f"dataset.image_size={SIZE}", "model.patch_size=8"]
    return trained_run(folder, "dataset=imagenet1k", "trainer.epochs=null", *place, *small)


def expected(run: Path, made: ImagenetVariant) -> tuple[Tensor, list[Tensor]]:
    """Logits, and targets, image by image."""
    model = restore(run, World(), task=lambda cfg: made).model.eval()
    pairs = [made.validation[index] for index in range(len(made.validation))]  # type: ignore[arg-type]
    with torch.no_grad():
        logits = [model(image[None])[0] for image, _ in pairs]
    return torch.stack(logits), [target for _, target in pairs]


def test_a_run_is_evaluated_on_all_of_them(
    run: Path, roots: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = real_labels(tmp_path, [list(range(0, 1000, 2)), [], list(range(500))])

    def metrics(variant: str, **more: Any) -> dict[str, float]:
        place = (f"dataset.root={roots[variant]}",)
        given = {"run": str(run), "device": "cpu", "changes": place, "variant": variant, **more}
        return evaluate(asked("evaluate", EvaluateSchema, **given), World())[1]

    for variant in ("a", "real"):
        more = {"labels": str(labels)} if variant == "real" else {}
        made = task(variant, roots[variant], labels if more else None)  # type: ignore[arg-type]
        logits, targets = expected(run, made)
        if made.classes is not None:
            logits = logits[:, made.classes]
        ranked = logits.topk(5).indices
        pairs = zip(ranked, targets, strict=True)
        right = [target[row] if target.ndim else row == target for row, target in pairs]
        top1 = 100 * sum(float(hits[0]) for hits in right) / len(right)
        result = metrics(variant, **more)
        assert result["top1"] == pytest.approx(top1)
        assert ("loss" in result) == (variant == "a")
        if variant == "a":
            loss = torch.nn.functional.cross_entropy(logits, torch.stack(targets))
            assert result["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert "other data" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"dataset\.image_size: expected int, got 'x'"):
        metrics("a", changes=(f"dataset.root={roots['a']}", "dataset.image_size=x"))
    with pytest.raises(UserError, match=r"dataset\.root: expected str, got None"):
        metrics("a", changes=("dataset.root=null",))


def test_a_variant_of_another_data_set_is_refused(real_run: Path) -> None:
    given = {"run": str(real_run), "device": "cpu", "variant": "v2"}
    with pytest.raises(UserError, match="run: expected a run on ImageNet's 1000 classes"):
        evaluate(asked("evaluate", EvaluateSchema, **given), World())
    with pytest.raises(UserError, match="labels: expected null but for variant=real"):
        asked("evaluate", EvaluateSchema, **given | {"labels": "real.json"})
