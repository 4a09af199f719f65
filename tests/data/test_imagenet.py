import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from from_yaml import from_yaml
from padst_exp.data.imagenet import Imagenet1k
from padst_exp.data.sampler import train_loader, validation_loader
from padst_exp.errors import UserError

CLASSES = ("n01", "n02", "n03")


def jpeg(seed: int, shade: int) -> bytes:
    """A noisy image of one shade, of a size of its own."""
    rng = np.random.default_rng(seed)
    size = (40 + seed % 5, 36 + seed % 7, 3)
    pixels = (shade + rng.integers(40, size=size)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


def table(count: int, classes: int = len(CLASSES)) -> dict[str, list[object]]:
    labels = [number % classes for number in range(count)]
    images = [
        {"bytes": jpeg(number, 70 * label), "path": f"{number}.jpg"}
        for number, label in enumerate(labels)
    ]
    return {"image": list(images), "label": list(labels)}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folders(tmp_path: Path) -> str:
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "folders" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.JPEG").write_bytes(jpeg(number, 70 * label))
    return str(tmp_path / "folders")


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    import datasets

    (tmp_path / "parquet").mkdir()
    for name, count in (("train-00000-of-00001", 12), ("validation-00000-of-00001", 6)):
        path = tmp_path / "parquet" / f"{name}.parquet"
        datasets.Dataset.from_dict(table(count)).to_parquet(path)
    return str(tmp_path / "parquet")


def batches(task: Imagenet1k, *, workers: int, start: int = 0) -> list[torch.Tensor]:
    loader = train_loader(
        task,
        batch_size=6,
        micro_batches=1,
        start_step=start,
        total_steps=3,
        seed=1,
        rank=0,
        world_size=1,
        workers=workers,
    )
    return [inputs for inputs, _ in loader]


@pytest.mark.parametrize("layout", ["folders", "parquet"])
def test_both_layouts_go_through_transforms_and_mixup(
    layout: str, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(layout)
    task = from_yaml("dataset/imagenet1k", root=root, num_classes=3, image_size=32)
    assert (len(task.train), len(task.validation)) == (12, 6)
    loader = train_loader(
        task,
        batch_size=6,
        micro_batches=1,
        start_step=0,
        total_steps=2,
        seed=0,
        rank=0,
        world_size=1,
        workers=0,
    )
    labels = []
    for inputs, targets in loader:
        labels += targets.tolist()
        assert inputs.shape == (6, 3, 32, 32)
        mixed, soft = task.augment(inputs, targets, 3)
        assert mixed.shape == inputs.shape
        assert soft.shape == (6, 3)
        assert task.loss(torch.zeros(6, 3), soft).item() == pytest.approx(np.log(3), rel=1e-5)
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    # The validation images show their class: the brighter, the later.
    inputs, targets = next(
        iter(validation_loader(task, batch_size=6, rank=0, world_size=1, workers=0))
    )
    means = torch.stack([inputs[targets == label].mean() for label in range(3)])
    assert torch.equal(means.argsort(), torch.arange(3))


def test_augmentation_does_not_depend_on_workers_or_resuming(folders: str) -> None:
    task = from_yaml("dataset/imagenet1k", root=folders, num_classes=3, image_size=32)
    state = torch.get_rng_state()
    straight = batches(task, workers=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for workers, start in ((0, 0), (2, 0), (0, 2)):
        again = batches(task, workers=workers, start=start)
        assert len(again) == 3 - start
        assert all(map(torch.equal, again, straight[start:]))
    assert not torch.equal(task.train[(0, 0)][0], task.train[(1, 0)][0])


def test_repeated_augmentation_draws_an_image_several_ways(folders: str) -> None:
    task = from_yaml("dataset/imagenet1k", root=folders, num_classes=3, image_size=32, repeats=3)
    first, second, third, *_ = batches(task, workers=0)[0]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_another_number_of_classes_is_an_error(folders: str) -> None:
    with pytest.raises(UserError, match=r"dataset\.num_classes: expected 3, .* got 1000"):
        from_yaml("dataset/imagenet1k", root=folders)


def test_labels_with_gaps_are_an_error(tmp_path: Path) -> None:
    import datasets

    rows = table(4, classes=2)
    rows["label"] = [0, 7, 0, 7]
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=r"dataset\.root: expected labels 0, 1, .* 2 from 0 to 7"):
        from_yaml("dataset/imagenet1k", root=str(tmp_path), num_classes=2)


def test_differing_class_folders_are_an_error(folders: str) -> None:
    (Path(folders) / "val" / "n03").rename(Path(folders) / "val" / "n04")
    with pytest.raises(UserError, match="the same classes in training and validation"):
        from_yaml("dataset/imagenet1k", root=folders, num_classes=3)


def test_a_broken_image_is_named(folders: str) -> None:
    path = Path(folders) / "train" / "n02" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    task = from_yaml("dataset/imagenet1k", root=folders, num_classes=3, image_size=32)
    with pytest.raises(UserError, match=r"n02/1\.JPEG") as error:
        task.train[(0, 5)]
    assert "\n" not in str(error.value)


def test_missing_data_names_root(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: expected train/ and val/ of .* got "):
        from_yaml("dataset/imagenet1k", root=str(tmp_path))
    (tmp_path / "train" / "n01").mkdir(parents=True)
    with pytest.raises(UserError, match=r"dataset\.root: .*train") as error:
        from_yaml("dataset/imagenet1k", root=str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_unreadable_parquet_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"dataset\.root: expected a readable train parquet .*empty"
    ) as error:
        from_yaml("dataset/imagenet1k", root=str(tmp_path))
    assert "\n" not in str(error.value)


def test_bad_values_name_their_key(folders: str) -> None:
    cases: list[tuple[str, object]] = [
        ("auto_augment", "rand-x9"),
        ("auto_augment", "nonsense"),
        ("repeats", 0),
        ("reprob", 2.0),
        ("crop_pct", 0.0),
        ("color_jitter", -1.0),
    ]
    for key, value in cases:
        with pytest.raises(UserError, match=rf"^dataset\.{key}: expected .*, got {value}$"):
            from_yaml("dataset/imagenet1k", root=folders, num_classes=3, **{key: value})


def test_three_augment_and_color_jitter_are_accepted(folders: str) -> None:
    task = from_yaml(
        "dataset/imagenet1k",
        root=folders,
        num_classes=3,
        image_size=32,
        auto_augment="3a",
        color_jitter=0.3,
    )
    assert task.train[(0, 0)][0].shape == (3, 32, 32)


def test_strong_policies_survive_posterizing_to_nothing(folders: str) -> None:
    for policy in ("rand-m10-n5-inc1", "v0", "augmix-m10"):
        task = from_yaml(
            "dataset/imagenet1k", root=folders, num_classes=3, image_size=8, auto_augment=policy
        )
        for epoch in range(60):
            assert task.train[(epoch, 5)][0].isfinite().all()
