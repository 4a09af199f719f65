import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from from_yaml import from_yaml
from padst_exp.data import small_images, sources
from padst_exp.data.image_files import read_cifar, read_idx
from padst_exp.data.images import AugmentedImages, TensorImages
from padst_exp.data.sampler import train_loader
from padst_exp.errors import UserError

FIRST_LABELS = [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def fashion_folder(folder: Path, *, zipped: bool) -> np.ndarray:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(12, 28, 28))
    for prefix, count in (("train", 12), ("t10k", 5)):
        files = {
            f"{prefix}-images-idx3-ubyte": idx(images[:count]),
            f"{prefix}-labels-idx1-ubyte": idx(np.arange(count) % 10),
        }
        for name, content in files.items():
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content) if zipped else content)
    return images


def test_digits_split_is_fixed_stratified_and_complete() -> None:
    task = from_yaml("dataset/digits", shift=0)
    assert (len(task.train), len(task.validation)) == (1437, 360)
    counts = task.validation.labels.bincount()
    assert counts.min() >= 35
    assert counts.max() <= 37
    train = {row.numpy().tobytes() for row in task.train.source.images}
    assert not any(row.numpy().tobytes() in train for row in task.validation.images)
    # Held down so that no release of scikit-learn moves the split unnoticed.
    assert task.validation.labels[:10].tolist() == FIRST_LABELS
    inputs, targets = task.train.__getitems__([(0, index) for index in range(1437)])
    assert inputs.shape == (1437, 1, 8, 8)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert abs(inputs.mean().item()) < 0.01
    assert abs(inputs.std().item() - 1) < 0.01


def test_what_is_held_out_is_a_tenth_of_the_training_images_and_trains_nothing() -> None:
    def pixels(images: torch.Tensor) -> list[bytes]:
        return sorted(row.numpy().tobytes() for row in images)

    whole, task = (from_yaml("dataset/digits", split=split) for split in ("test", "held_out"))
    assert (len(task.train), len(task.validation)) == (1294, 143)
    both = torch.cat([task.train.source.images, task.validation.images])
    assert pixels(both) == pixels(whole.train.source.images)
    assert set(task.validation.labels.tolist()) == set(range(10))
    again = from_yaml("dataset/digits", split="held_out")
    assert again.describe() == task.describe() != whole.describe()


def augmented(size: int = 5, shift: int = 1, flip: bool = True) -> AugmentedImages:
    images = torch.arange(1, 1 + 30 * 2 * size * size).remainder(251).view(30, 2, size, size)
    source = TensorImages(images.to(torch.uint8), torch.arange(30), [0.0, 0.0], [1.0, 1.0])
    return AugmentedImages(source, shift=shift, flip=flip)


def test_augmentation_is_one_of_all_shifts_and_mirrors() -> None:
    dataset = augmented()
    seen = set()
    for epoch in range(200):
        drawn, label = dataset[(epoch, 3)]
        assert label == 3
        padded = torch.nn.functional.pad(dataset.source.images[3].float(), [1] * 4)
        candidates = {
            (down, right, flip): window.flip(2) if flip else window
            for down in range(3)
            for right in range(3)
            for window in [padded[:, down : down + 5, right : right + 5]]
            for flip in (False, True)
        }
        matches = [key for key, window in candidates.items() if torch.equal(window, drawn)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 18


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    dataset = augmented()
    together, _ = dataset.__getitems__([(2, index) for index in range(30)])
    alone = torch.stack([dataset[(2, index)][0] for index in reversed(range(30))]).flip(0)
    assert torch.equal(together, alone)
    next_epoch, _ = dataset.__getitems__([(3, index) for index in range(30)])
    assert not torch.equal(together, next_epoch)
    dataset.seed = 1
    other_seed, _ = dataset.__getitems__([(2, index) for index in range(30)])
    assert not torch.equal(together, other_seed)


def test_augmented_batches_do_not_depend_on_workers() -> None:
    task = from_yaml("dataset/digits", shift=1)

    def batches(workers: int) -> torch.Tensor:
        loader = train_loader(
            task,
            batch_size=64,
            micro_batches=2,
            start_step=21,
            total_steps=24,
            seed=7,
            rank=0,
            world_size=1,
            workers=workers,
        )
        return torch.stack([inputs for inputs, _ in loader])

    assert torch.equal(batches(0), batches(2))


def test_fashion_mnist_reads_idx_files(tmp_path: Path) -> None:
    for zipped in (False, True):  # gzipped ones come first
        images = fashion_folder(tmp_path, zipped=zipped)
        for plain in tmp_path.glob("*-ubyte") if zipped else []:
            plain.write_bytes(b"")
        task = from_yaml("dataset/fashion_mnist", root=str(tmp_path), shift=0, flip=False)
        assert (len(task.train), len(task.validation)) == (12, 5)
        inputs, target = task.validation[3]
        assert target == 3
        torch.testing.assert_close(inputs[0] * 90.02 + 72.94, torch.tensor(images[3]).float())


def test_too_few_images_to_hold_some_out(tmp_path: Path) -> None:
    fashion_folder(tmp_path, zipped=False)
    held = from_yaml("dataset/fashion_mnist", root=str(tmp_path), split="held_out", flip=False)
    assert (len(held.train), len(held.validation)) == (11, 1)
    images, labels = np.zeros((9, 28, 28)), np.zeros(9)
    for name, content in (("images-idx3", images), ("labels-idx1", labels)):
        (tmp_path / f"train-{name}-ubyte").write_bytes(idx(content))
    with pytest.raises(UserError, match=r"^dataset\.split: expected test, or ten images at least"):
        from_yaml("dataset/fashion_mnist", root=str(tmp_path), split="held_out")


def test_broken_idx_files_are_told_in_one_line(tmp_path: Path) -> None:
    cases = {
        b"": "it starts with nothing",
        idx(np.zeros((2, 2, 2)))[:-1]: "expected 8 bytes",
        idx(np.zeros((2, 2, 2))) + b"x": "expected 8 bytes",
        idx(np.zeros(8)): "it starts with 00000801",
        b"<html>" * 9: "it starts with 3c68746d",
    }
    plain, zipped = tmp_path / "images", tmp_path / "images.gz"
    for content, message in cases.items():
        plain.write_bytes(content)
        zipped.write_bytes(gzip.compress(content))
        for path in (plain, zipped):
            with pytest.raises(UserError, match=message) as error:
                read_idx(path, 3)
            assert "\n" not in str(error.value)
            assert str(path) in str(error.value)


def test_broken_gzip_files_are_told_in_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(idx(np.random.default_rng(0).integers(256, size=(9, 9, 9))))
    path = tmp_path / "images.gz"
    cut, bad_crc = whole[:-20], whole[:-8] + bytes(4) + whole[-4:]
    for content in (cut, b"", b"PK" + whole, bad_crc):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^dataset\.root: .*images\.gz") as error:
            read_idx(path, 3)
        assert "\n" not in str(error.value)


def test_fashion_mnist_without_its_files_names_root(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"dataset\.root: expected a folder with train-images-idx3-ubyte"
    ):
        from_yaml("dataset/fashion_mnist", root=str(tmp_path))
    with pytest.raises(UserError, match=r"dataset\.root: expected an existing .*nowhere$"):
        from_yaml("dataset/fashion_mnist", root=str(tmp_path / "nowhere"))
    fashion_folder(tmp_path, zipped=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(11) % 10))
    with pytest.raises(UserError, match=r"images \[11, 1, 28, 28\], got shape \[12, 1, 28, 28\]"):
        from_yaml("dataset/fashion_mnist", root=str(tmp_path))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.full(12, 10)))
    with pytest.raises(
        UserError, match="labels from 0 to 9 in the training split, got 10 in row 0"
    ):
        from_yaml("dataset/fashion_mnist", root=str(tmp_path))


def test_an_unreachable_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unplugged:
        def head(self, url: str, timeout: float) -> None:
            raise OSError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Unplugged)
    monkeypatch.setattr(small_images, "FASHION_MNIST_SYSTEM", Path("/nonexistent"))
    for name in ("fashion_mnist", "cifar100"):
        with pytest.raises(UserError, match=r"^dataset\.root: .*no route to host more\)") as error:
            from_yaml(f"dataset/{name}")
        assert "\n" not in str(error.value)


def test_an_empty_offline_cache_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"dataset\.root: expected a local copy of nobody/no") as e:
        sources.load_hub("nobody/nothing", name=None, split="train")
    assert "\n" not in str(e.value)


def cifar_table(count: int) -> dict[bytes, object]:
    pixels = np.random.default_rng(count).integers(256, size=(count, 3072), dtype=np.uint8)
    return {b"data": pixels, b"fine_labels": [label % 100 for label in range(count)]}


def cifar_tar(path: Path, tables: dict[str, dict[bytes, object]]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, table in tables.items():
            content = pickle.dumps(table, protocol=2)
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_cifar_reads_folders_and_tars(tmp_path: Path) -> None:
    tables = {"train": cifar_table(9), "test": cifar_table(4)}
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for (name, table), protocol in zip(tables.items(), (2, 5), strict=True):
        (folder / name).write_bytes(pickle.dumps(table, protocol=protocol))
    archive = tmp_path / "elsewhere.tar.gz"
    cifar_tar(archive, tables)
    for root in (folder, tmp_path, archive):
        task = from_yaml("dataset/cifar100", root=str(root), shift=0, flip=False)
        assert (len(task.train), len(task.validation)) == (9, 4)
        pixels = tables["test"][b"data"]
        assert isinstance(pixels, np.ndarray)
        assert task.validation.images[2].flatten().tolist() == pixels[2].tolist()
        assert task.validation[2][1] == 2


def test_cifar_10_reads_its_five_batches(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        table = {b"data": cifar_table(2 + number)[b"data"], b"labels": [9] * (2 + number)}
        (folder / name).write_bytes(pickle.dumps(table, protocol=2))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    for root in (tmp_path, folder, tmp_path / "cifar-10-python.tar.gz"):
        task = from_yaml("dataset/cifar10", root=str(root), shift=0, flip=False)
        assert (len(task.train), len(task.validation)) == (2 + 3 + 4 + 5 + 6, 7)
        assert task.model_shape["num_classes"] == 10 and task.validation[0][1] == 9
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match=r"dataset\.root: expected cifar-10-batches-py"):
        from_yaml("dataset/cifar10", root=str(folder))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('ran')",))


def test_cifar_runs_no_code_and_refuses_broken_files(tmp_path: Path) -> None:
    for content in (
        pickle.dumps({b"data": Evil(), b"fine_labels": []}),
        pickle.dumps(cifar_table(3))[:-100],
        b"",
        pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"fine_labels": [0, 1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}),
    ):
        (tmp_path / "train").write_bytes(content)
        with pytest.raises(UserError, match=r"^dataset\.root: .*train") as error:
            read_cifar(tmp_path, "train")
        assert "\n" not in str(error.value)


def test_cifar_reads_parquet_as_the_hub_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    rows = {
        "img": [{"bytes": png(image), "path": None} for image in pixels],
        "fine_label": [5, 99, 0],
        "coarse_label": [0, 0, 0],
    }
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"data/{split}-00000.parquet")
    task = from_yaml("dataset/cifar100", root=str(tmp_path / "data"))
    assert task.validation.labels.tolist() == [5, 99, 0]
    assert np.array_equal(task.validation.images.permute(0, 2, 3, 1).numpy(), pixels)
    with pytest.raises(UserError, match=r"dataset\.root: expected cifar-100-python"):
        from_yaml("dataset/cifar100", root=str(tmp_path / "cache"))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
