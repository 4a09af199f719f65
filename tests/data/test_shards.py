"""Images in WebDataset shards: the same batches as from folders, and nothing taken on trust."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from from_yaml import from_yaml
from padst_exp.data.imagenet import Imagenet1k
from padst_exp.data.sampler import train_loader
from padst_exp.errors import UserError

Member = tuple[str, bytes] | tarfile.TarInfo
ONE_LINE = r"^dataset\.root: expected "


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def jpeg(number: int) -> bytes:
    """A noisy image of a class, 0 to 2, and of a size of its own."""
    rng = np.random.default_rng(number)
    size = (40 + number % 5, 36 + number % 7, 3)
    pixels = (number % 3 * 70 + rng.integers(40, size=size)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


def sample(number: int, *, label: bytes | None = None) -> list[Member]:
    return [
        (f"n{number % 3}_{number}.jpg", jpeg(number)),
        (f"n{number % 3}_{number}.cls", str(number % 3).encode() if label is None else label),
    ]


def written(path: Path, members: Sequence[Member]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def shards(root: Path) -> Path:
    """Twelve training images in three shards, six for validation in one."""
    for shard in range(3):
        parts = [part for n in range(4 * shard, 4 * shard + 4) for part in sample(n)]
        written(root / f"imagenet1k-train-{shard:04d}.tar", parts)
    written(root / "imagenet1k-validation-00.tar", [p for n in range(20, 26) for p in sample(n)])
    return root


def task(root: Path | str, **changes: object) -> Imagenet1k:
    made: Imagenet1k = from_yaml(
        "dataset/imagenet1k", root=str(root), num_classes=3, image_size=32, **changes
    )
    return made


def batches(
    task: Imagenet1k, *, workers: int = 0, start: int = 0, rank: int = 0, world_size: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = train_loader(
        task, batch_size=6, micro_batches=1, start_step=start, total_steps=4, seed=1, rank=rank,
        world_size=world_size, workers=workers,
    )  # fmt: skip
    return list(loader)


def test_shards_resume_exactly_with_any_workers_and_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = task(shards(tmp_path / "own"))
    assert "train: 3 shards, 12 images in 3 classes, from " in capsys.readouterr().err
    straight = batches(made)
    labels = [label for _, targets in straight[:2] for label in targets.tolist()]
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    resumed = batches(made, workers=2, start=1)
    assert all(torch.equal(a, b) for x, y in zip(resumed, straight[1:], strict=True)
               for a, b in zip(x, y, strict=True))  # fmt: skip
    ranks = [batches(made, start=2, rank=rank, world_size=2) for rank in range(2)]
    for (whole, _), *parts in zip(straight[2:], *ranks, strict=True):
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), whole)
    sent = pickle.loads(pickle.dumps(made.train))
    assert torch.equal(sent[(0, 5)][0], made.train[(0, 5)][0])


def test_shards_hold_what_folders_hold(tmp_path: Path) -> None:
    order = sorted(range(12), key=lambda n: (n % 3, n))
    for number in order:
        path = tmp_path / "folders" / "train" / f"n{number % 3}" / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    (tmp_path / "folders" / "val").symlink_to("train")
    both = tmp_path / "shards" / "train" / "0.tar", tmp_path / "shards" / "val" / "0.tar"
    parts = [part for number in order for part in sample(number)]
    readme: list[Member] = [("./README", b"x"), (".cache/x.jpg", b"x"), ("__meta__.json", b"x")]
    for path in both:
        written(path, [*readme, *parts])
    folders, tars = task(tmp_path / "folders"), task(tmp_path / "shards")
    assert folders.train.fingerprint() != tars.train.fingerprint()
    for ours, theirs in zip(batches(tars), batches(folders), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_labels_in_json_and_names_of_any_length(tmp_path: Path) -> None:
    parts: list[Member] = []
    for number in range(3):
        key = f"{'folder/' * 40}{number}"  # beyond what a plain header holds
        about = {"label": number, "width": 36}
        parts += [(f"{key}.JPEG", jpeg(number)), (f"{key}.json", json.dumps(about).encode())]
    for split in ("train", "val"):
        written(tmp_path / "own" / f"{split}-0.tar", parts)
    made = task(tmp_path / "own")
    assert [int(made.validation[index][1]) for index in range(3)] == [0, 1, 2]


def test_what_the_library_of_that_name_writes_and_reads(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    (tmp_path / "own").mkdir()
    for split, count in (("train", 11), ("val", 5)):
        pattern = str(tmp_path / "own" / f"x-{split}-%03d.tar")
        with wds.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
            for number in range(count):
                writer.write({"__key__": f"{number:03}", "jpg": jpeg(number), "cls": number % 3})
    made = task(f"{tmp_path}/own/x-{{train-{{000..002}},val-{{000..001}}}}.tar")
    assert (len(made.train), len(made.validation)) == (11, 5)
    paths = sorted(map(str, (tmp_path / "own").glob("x-train-*.tar")))
    theirs = [*wds.WebDataset(paths, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")]
    source = made.train.source
    ours = [source.read(index) for index in range(len(source))]
    assert [label for _, label in ours] == [label for _, label in theirs]
    for (image, _), (other, _) in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(other))
    with pytest.raises(UserError, match=r"x-val-002\.tar, which is missing$"):
        task(f"{tmp_path}/own/x-{{train-{{000..002}},val-{{000..002}}}}.tar")
    for pattern in ("{0..99999999}", "{0..999999}{0..999999}", "{", "{" * 3000, "a,{b"):
        with pytest.raises(UserError, match=ONE_LINE) as error:
            task(f"{tmp_path}/{pattern}.tar")
        assert len(str(error.value)) < 9000
    with pytest.raises(UserError, match="a brace pattern with validation shards"):
        task(f"{tmp_path}/own/x-train-{{000..002}}.tar")


def test_the_list_of_members_is_kept_until_a_shard_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shards(tmp_path / "own")
    before = task(root).describe()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert task(root).describe() == before
    moved = root.rename(tmp_path / "moved")
    assert task(moved).describe() == before
    first = moved / "imagenet1k-train-0000.tar"
    written(first, [part for n in (0, 1, 2, 13) for part in sample(n)])
    after = task(moved).describe()
    assert after["training"] == before["training"]
    assert after["fingerprint"] != before["fingerprint"]
    first.write_bytes(first.read_bytes()[:1500])
    with pytest.raises(UserError, match=r"train-0000\.tar \(it is cut or damaged|unexpected end"):
        task(moved)


def link(kind: bytes, name: str = "n0_1.jpg", to: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


HOSTILE: dict[str, list[Member]] = {
    "a symbolic link": [link(tarfile.SYMTYPE)],
    "a hard link": [link(tarfile.LNKTYPE, to="n0_0.jpg")],
    "a device": [link(tarfile.CHRTYPE)],
    "a pipe": [link(tarfile.FIFOTYPE)],
    "a path outside": [("../x.jpg", jpeg(0)), ("../x.cls", b"0")],
    "an absolute path": [("/tmp/x.jpg", jpeg(0)), ("/tmp/x.cls", b"0")],
    "no label": [("x.jpg", jpeg(0))],
    "no image": [("x.cls", b"0")],
    "two images": [("x.jpg", jpeg(0)), ("x.png", jpeg(0)), ("x.cls", b"0")],
    "the same twice": [("x.jpg", jpeg(0)), ("x.jpg", jpeg(0)), ("x.cls", b"0")],
    "apart": [("x.jpg", jpeg(0)), ("y.jpg", jpeg(0)), ("x.cls", b"0"), ("y.cls", b"0")],
    "an empty image": [("x.jpg", b""), ("x.cls", b"0")],
    "another layout": [("n01440764.tar", b"x" * 600), ("n01443537.tar", b"x" * 600)],
    "a long label": [("x.jpg", jpeg(0)), ("x.cls", b"0" * (1 << 21))],
    **{
        f"label {label!r}": sample(0, label=label)
        for label in (b"", b"x", b"-1", b"1.0", b"1_0", b"99999999999", "\u0661".encode())
    },
    **{
        f"json {text!r}": [("x.jpg", jpeg(0)), ("x.json", text)]
        for text in (b"", b"{", b"[]", b"{}", b'{"label": true}', b'{"label": -1}', b"[" * 9999)
    },
    "a label with gaps": sample(0, label=b"7"),
    "nothing": [],
}


def edited(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return edit


def announced(size: bytes) -> Callable[[bytes], bytes]:
    """Another size in the header of the first member, with its checksum."""

    def change(content: bytes) -> bytes:
        head = bytearray(content[:512])
        head[124:136] = size
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return bytes(head) + content[512:]

    return change


DAMAGE = {
    "cut in the end": edited(lambda c: c[:-10240]),
    "cut between members": edited(lambda c: c[: len(c) // 1024 * 512]),
    "cut in a member": edited(lambda c: c[:700]),
    "a damaged header": edited(lambda c: c.replace(b"n2_5.cls", b"n2_5.clx", 1)),
    "more behind its end": edited(lambda c: c + c),
    "compressed": edited(lambda c: b"\x1f\x8b" + c),
    "a huge member": edited(announced(b"77777777777\0")),
    "a negative size": edited(announced(b"\xff" * 12)),
    "no tar": edited(lambda c: b"<!DOCTYPE html>" * 99),
    "empty": edited(lambda c: b""),
}


def test_hostile_and_damaged_shards_are_one_line(tmp_path: Path) -> None:
    root = shards(tmp_path / "own")
    path = root / "imagenet1k-train-0001.tar"
    sound = path.read_bytes()
    cases: dict[str, Callable[[Path], object]] = dict(DAMAGE)
    for name, members in HOSTILE.items():
        parts = [*sample(1), *members] if name != "nothing" else []
        cases[name] = lambda path, parts=parts: written(path, parts)  # type: ignore[misc]
    wrong = []
    for name, damage in cases.items():
        path.write_bytes(sound)
        damage(path)
        try:
            task(root)
            wrong.append(f"{name}: read")
        except UserError as error:
            line = str(error)
            named = "imagenet1k-train-000" in line and line.startswith("dataset.root: expected ")
            if not named or not line.isprintable() or len(line) > 600:
                wrong.append(f"{name}: {line}")
    # A shard without images is one that its writer opened last.
    assert wrong == ["nothing: read"]


def test_a_damaged_image_is_named_with_its_shard(tmp_path: Path) -> None:
    root = shards(tmp_path / "own")
    path = root / "imagenet1k-train-0001.tar"
    parts = [*sample(4), *sample(5), ("n0_6.jpg", jpeg(6)[:200]), ("n0_6.cls", b"0"), *sample(7)]
    written(path, parts)
    made = task(root)
    with pytest.raises(UserError, match=rf"expected an image, got n0_6\.jpg in {path} \("):
        made.train[(0, 6)]
    path.unlink()
    with pytest.raises(UserError, match=rf"got {path} \(there is no such file\)"):
        made.train[(0, 6)]


def test_two_copies_of_a_split_are_an_error_that_lists_them(tmp_path: Path) -> None:
    root = shards(tmp_path / "own")
    (root / "ILSVRC2012_img_train.tar").write_bytes(b"of class archives")
    assert len(task(root).train) == 12
    for path in (root / "x-train-0.tar", root / "train.parquet", root / "train" / "n0" / "0.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        with pytest.raises(UserError, match=r"expected one copy of the train ") as error:
            task(root)
        assert "imagenet1k-train-0000.tar" in str(error.value)
        path.unlink()


def test_missing_shards_are_told_where_they_are_listed(tmp_path: Path) -> None:
    root = shards(tmp_path / "own")
    names = {"train": [f"imagenet1k-train-{n:04d}.tar" for n in range(3)],
             "validation": ["imagenet1k-validation-00.tar"]}  # fmt: skip
    info = {"splits": {split: {"filenames": found} for split, found in names.items()}}
    (root / "_info.json").write_text(json.dumps(info))
    assert len(task(root).train) == 12
    (root / "imagenet1k-train-0002.tar").unlink()
    with pytest.raises(UserError, match=r"2 of them, without imagenet1k-train-0002\.tar$"):
        task(root)
    for text in ("", "[]", '{"splits": 3}', '{"splits": {"a": {"filenames": 3}}}', "[" * 9999):
        (root / "_info.json").write_text(text)
        with pytest.raises(UserError, match=r"_info\.json \(") as error:
            task(root)
        assert str(error.value).isprintable()
