"""Which files make a split, and what is said of damaged ones."""

import gzip
from pathlib import Path

import pytest

from padst_exp.data.sources import load_files, split_files
from padst_exp.errors import UserError
from padst_exp.files import reading

TEXT = "one line\n and another\n"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))


def written(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(TEXT)
    return root


def found(root: Path, split: str) -> list[str]:
    files = split_files(root, split)  # type: ignore[arg-type]
    return [] if files is None else [str(Path(file).relative_to(root)) for file in files[1]]


def test_the_name_of_a_file_decides_its_split(tmp_path: Path) -> None:
    folder = "gpt2-train-data"
    layouts = {
        "plain": ("train.txt", "valid.txt", "test.txt"),
        "words of a folder": tuple(f"{folder}/{name}.txt" for name in ("train", "valid", "test")),
        "a folder called like a split": tuple(f"train/{x}.txt" for x in ("train", "val", "test")),
        "split folders": ("train/a.txt", "val/a.txt", "test/a.txt"),
        "deep split folders": ("x/train/y/a.txt", "x/validation/y/a.txt", "x/test/y/a.txt"),
        "capitals": ("Wiki.TRAIN.raw", "Wiki.VALID.raw", "Wiki.Test.raw"),
        "packed": ("a-train.json.gz", "a-validation.json.gz", "a-test.json.gz"),
    }
    for layout, names in layouts.items():
        root = written(tmp_path / "of train and test" / layout, *names, "readme.txt")
        for split, name in zip(("train", "validation", "test"), names, strict=True):
            assert found(root, split) == [name], layout


def test_shards_make_one_split(tmp_path: Path) -> None:
    shards = [f"en/c4-train.{number:05d}-of-00003.json.gz" for number in range(3)]
    assert found(written(tmp_path / "own", *shards), "train") == shards
    inside = ["train/part1/a.txt", "train/part2/b.txt"]
    assert found(written(tmp_path / "inside", *inside), "train") == inside


def test_hidden_files_belong_to_no_split(tmp_path: Path) -> None:
    hidden = ("._train.txt", ".backup/train.txt", ".ipynb_checkpoints/train-checkpoint.txt")
    root = written(tmp_path / ".data" / "text", "train.txt", *hidden, "test/.cache/a.txt")
    assert found(root, "train") == ["train.txt"]
    assert found(root, "test") == []


def test_two_copies_are_an_error_that_lists_them(tmp_path: Path) -> None:
    copies = (
        ("wiki.train.raw", "wiki.train.tokens"),
        ("train.txt", "backup/train.txt"),
        ("train.txt", "train.txt.gz"),
        ("train.txt", "train (1).txt"),
        ("train.txt", "train.parquet"),
        ("train-0-of-1.txt", "train-0-of-2.txt"),
        ("train/a.raw", "train/a.tokens"),
        ("train/a.txt", "other/train/a.txt"),
        ("val.txt", "valid.txt"),
    )
    for number, names in enumerate(copies):
        root = written(tmp_path / str(number), *names)
        with pytest.raises(UserError, match=r"^dataset\.root: expected one copy of ") as error:
            found(root, "validation" if "val.txt" in names else "train")
        assert "\n" not in str(error.value)
        assert all(name in str(error.value) for name in names)
    root = written(tmp_path / "both", "train-test.txt")
    with pytest.raises(UserError, match=r"one split in each file name, got .*train-test\.txt$"):
        found(root, "test")
    assert found(root, "validation") == []


def test_what_was_found_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = load_files(written(tmp_path / "text", "train-1.txt", "train-2.txt"), "train")
    assert len(table.rows) == 4
    assert "train: 2 text file(s), 4 rows" in capsys.readouterr().err


def test_damaged_files_are_named(tmp_path: Path) -> None:
    import datasets

    whole = gzip.compress(b'{"text": "some words"}\n' * 2000)
    parquet = tmp_path / "whole.parquet"
    datasets.Dataset.from_dict({"text": [str(x) for x in range(999)]}).to_parquet(parquet)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    cases = {
        "b-train-1.json.gz": (whole, whole[:-30], b"", pointer),
        "train-1.parquet": (parquet.read_bytes(), parquet.read_bytes()[:-30], b"", pointer),
        "train-1.txt": (TEXT.encode(), b"", b"\xff\xfe\x00", b"a" * 9 + b"\xff"),
        "train-1.jsonl": (b'{"text": "a"}\n', b'{"text": "a', b"", pointer),
    }
    for name, (sound, *damaged) in cases.items():
        for number, content in enumerate(damaged):
            root = tmp_path / f"{number} {name}"
            root.mkdir()
            (root / name.replace("1", "0")).write_bytes(sound)
            (root / name).write_bytes(content)
            with pytest.raises(UserError, match=r"^dataset\.root: expected a readable") as error:
                load_files(root, "train")
            line = str(error.value)
            assert str(root / name) in line
            assert "\n" not in line
            assert len(line) < 500
            assert ("Git LFS" in line) == (content == pointer)
            assert ("it is empty" in line) == (content == b"")


def test_a_damaged_copy_of_sound_files_is_made_again(tmp_path: Path) -> None:
    root = written(tmp_path / "text", "train.txt")
    rows = load_files(root, "train").rows
    (copy,) = {Path(file["filename"]) for file in rows.cache_files}
    content = copy.read_bytes()
    expected = rows["text"][:]
    del rows
    for damaged in (b"", content[: len(content) // 2]):
        copy.write_bytes(damaged)
        assert load_files(root, "train").rows["text"][:] == expected


class Panic(BaseException):
    pass


Panic.__name__ = "PanicException"


def test_every_error_of_a_library_is_one_short_line() -> None:
    for cause in (
        KeyError("x"),
        MemoryError(),
        OSError("a\nb"),
        ValueError("\0\x1b" * 999),
        Panic(),
    ):
        with pytest.raises(UserError) as error, reading("key", "/no/file", "a file"):
            raise cause
        line = str(error.value)
        assert line.startswith("key: expected a file, got /no/file (")
        assert line.isprintable()
        assert len(line) < 300
    with pytest.raises(KeyboardInterrupt), reading("key", "/no/file", "a file"):
        raise KeyboardInterrupt
