import io
import multiprocessing
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from from_yaml import from_yaml
from padst_exp.data.image_files import read_image
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


def test_hidden_files_and_folders_are_no_images(folders: str) -> None:
    image = jpeg(0, 0)
    for name in ("n01/._0.JPEG", ".ipynb_checkpoints/0.JPEG", "n01/.cache/0.jpg", ".DS_Store"):
        path = Path(folders) / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
    task = from_yaml("dataset/imagenet1k", root=folders, num_classes=3, image_size=32)
    assert len(task.train) == 12
    hidden = Path(folders).rename(Path(folders).parent / ".images")
    assert len(from_yaml("dataset/imagenet1k", root=str(hidden), num_classes=3).train) == 12


def test_folders_that_do_not_make_a_split_are_told(folders: str) -> None:
    root = Path(folders)
    validation = root / "val"
    (root / "validation").symlink_to(validation)
    with pytest.raises(UserError, match=r"one copy of the validation images, got .*/val, .*/v"):
        from_yaml("dataset/imagenet1k", root=folders, num_classes=3)
    (root / "validation").unlink()
    for number, image in enumerate(list(validation.rglob("*.JPEG"))):
        image.rename(validation / f"{number}.JPEG")
    for folder in CLASSES:
        (validation / folder).rmdir()
    (validation / "labels.txt").write_text("0.JPEG n01\n")
    (root / "ILSVRC2012_validation_ground_truth.json").write_text("[0]")
    with pytest.raises(UserError, match=r"a folder for each class in .*/val, got none") as error:
        from_yaml("dataset/imagenet1k", root=folders, num_classes=3)
    assert "\n" not in str(error.value)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_sixteen_bit_grey_levels_are_kept() -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    wide = Image.fromarray(levels)
    for content in (encoded(wide, "png"), encoded(wide, "tiff"), encoded(wide, "ppm")):
        grey = np.asarray(read_image(content, "x", "L")).astype(int)
        assert np.abs(grey - levels / 257.0).max() <= 0.5
        colour = np.asarray(read_image(content, "x", "RGB"))
        assert (colour == grey[:, :, None]).all()
    narrow = Image.fromarray((levels >> 8).astype(np.uint8))
    for kind in ("png", "tiff", "ppm", "bmp"):
        assert (np.asarray(read_image(encoded(narrow, kind), "x", "L")) == levels >> 8).all()
    for image in (
        Image.fromarray(levels.astype(np.float32)),
        Image.fromarray(levels * np.int32(9)),
    ):
        with pytest.raises(UserError, match=r"^dataset\.root: expected an image, got x \(its grey"):
            read_image(encoded(image, "tiff"), "x", "RGB")


def bomb() -> bytes:
    """A PNG of 195 megapixels, of which only the header is there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 15000, 13000, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + crc


def test_damaged_images_are_one_line_with_their_name(folders: str) -> None:
    path = Path(folders) / "train" / "n02" / "1.JPEG"
    whole = path.read_bytes()
    task = from_yaml("dataset/imagenet1k", root=folders, num_classes=3, image_size=32)
    pngs = encoded(Image.open(io.BytesIO(whole)), "png")
    damaged = [bomb(), b"", whole[:200], whole[:-300], b"\xff" * 3000, pngs[:-40]]
    rng = np.random.default_rng(0)
    for source in (whole, pngs) * 20:
        content = bytearray(source)
        for place in rng.integers(len(content), size=20):
            content[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(content))
    errors = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            task.train[(0, 5)]
        except UserError as error:
            errors += 1
            assert str(error).startswith(f"dataset.root: expected an image, got {path} (")
            assert str(error).isprintable()
            assert len(str(error)) < 500
    assert errors >= 26  # a flipped bit in a JPEG may still be a picture


def test_an_error_in_a_worker_arrives_as_the_line_it_was(folders: str) -> None:
    path = Path(folders) / "train" / "n02" / "1.JPEG"
    path.write_bytes(b"")
    task = from_yaml("dataset/imagenet1k", root=folders, num_classes=3, image_size=32)
    lines = set()
    for workers in (0, 2):
        with pytest.raises(UserError) as error:
            batches(task, workers=workers)
        lines.add(str(error.value))
    assert lines == {f"dataset.root: expected an image, got {path} (it is empty)"}


def test_cells_without_an_image_name_file_and_row(tmp_path: Path) -> None:
    import datasets

    feature = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for number, bad in enumerate((None, {"bytes": b"", "path": "a.jpg"})):
        root = tmp_path / str(number)
        root.mkdir()
        rows = table(6)
        datasets.Dataset.from_dict(rows, feature).to_parquet(root / "train-0-of-2.parquet")
        datasets.Dataset.from_dict(rows, feature).to_parquet(root / "validation.parquet")
        rows["image"][2] = bad
        datasets.Dataset.from_dict(rows, feature).to_parquet(root / "train-1-of-2.parquet")
        task = from_yaml("dataset/imagenet1k", root=str(root), num_classes=3, image_size=32)
        task.train[(0, 7)]
        with pytest.raises(UserError, match=r"got none in row 2 of .*train-1-of-2\.parquet$"):
            task.train[(0, 8)]


def test_labels_that_are_no_class_are_one_line(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["a", "b"])
    values = datasets.Value
    cases = (
        ([0, 1, -1, 0], names),
        ([0, 1, -1, 0], values("int64")),
        ([0.0, 1.0, 0.0, 1.0], values("float32")),
        ([0, 1, None, 0], values("int64")),
        (["0", "1", "0", "1"], values("string")),
        ([True, False, True, False], values("bool")),
        ([[0], [1], [0], [1]], datasets.Sequence(values("int64"))),
    )
    for number, (labels, feature) in enumerate(cases):
        rows, root = table(4), tmp_path / str(number)
        rows["label"] = list(labels)
        root.mkdir()
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        for split in ("train", "validation"):
            datasets.Dataset.from_dict(rows, features).to_parquet(root / f"{split}.parquet")
        with pytest.raises(UserError, match=r"^dataset\.root: expected labels from 0 to ") as error:
            from_yaml("dataset/imagenet1k", root=str(root), num_classes=2)
        assert "\n" not in str(error.value)
        assert str(root) in str(error.value)


def test_every_policy_can_be_sent_to_a_worker(folders: str, parquet: str) -> None:
    for root in (folders, parquet):
        for policy in ("rand-m9-mstd0.5-inc1", "3a", "augmix-m10", "v0", None):
            task = from_yaml(
                "dataset/imagenet1k",
                root=root,
                num_classes=3,
                image_size=8,
                auto_augment=policy,
                color_jitter=0.3,
                reprob=0.5,
            )
            sent = pickle.loads(pickle.dumps(task.train))
            assert torch.equal(sent[(0, 5)][0], task.train[(0, 5)][0])


def test_start_methods_give_the_same_batches(folders: str) -> None:
    task = from_yaml("dataset/imagenet1k", root=folders, num_classes=3, image_size=32)
    straight = batches(task, workers=0, start=2)
    for method in ("spawn", "forkserver"):
        before = multiprocessing.get_start_method()
        multiprocessing.set_start_method(method, force=True)
        try:
            again = batches(task, workers=1, start=2)
        finally:
            multiprocessing.set_start_method(before, force=True)
        assert all(map(torch.equal, again, straight))
