"""Where rows come from: local files of any common format, or the Hugging Face hub."""

import codecs
import gzip
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from padst_exp.cache import cache_folder
from padst_exp.errors import UserError, require
from padst_exp.files import reading, reason
from padst_exp.messages import say

if TYPE_CHECKING:
    import datasets

Split = Literal["train", "validation", "test"]

SPLIT_NAMES = {"train": {"train"}, "validation": {"validation", "valid", "val"}, "test": {"test"}}
BUILDERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".raw": "text",
    ".tokens": "text",
    ".tar": "webdataset",
}
PACKINGS = (".gz", ".zst")
OWN_ARCHIVE = "ILSVRC2012_img_"
IMAGES = (".parquet",)
"""Formats that hold images with their labels, in rows."""
SHARDS = (".tar",)
"""Formats that hold the same as files in a file."""
TEXTS = tuple(suffix for suffix in BUILDERS if suffix not in SHARDS)
HUB_TIMEOUT_S = 5


def existing(path: str, key: str) -> Path:
    """The path, expanded.

    Raises:
        UserError: it does not exist.
    """
    found, wanted = Path(path).expanduser(), "an existing file or folder"
    with reading(f"dataset.{key}", found, wanted):
        require(found.exists(), f"dataset.{key}", path, wanted)
    return found


@dataclass(frozen=True)
class Table:
    """The rows of a split, and the files they were read from (none where the hub gave them)."""

    rows: "datasets.Dataset"
    files: tuple[str, ...] = ()

    def undecoded(self, image: str) -> "Table":
        """The same with cells {bytes, path} in column `image`."""
        import datasets

        with reading("dataset.root", self.source, f"images in column {image!r}"):
            rows = self.rows.cast_column(image, datasets.Image(decode=False))
        return Table(rows, self.files)

    def image(self, cell: object, index: int) -> bytes:
        """The bytes in a cell of row `index`.

        Raises:
            UserError: there are none.
        """
        content = cell.get("bytes") if isinstance(cell, dict) else None
        require(bool(content), "dataset.root", f"none in {Place(self, index)}", "an image")
        assert isinstance(content, bytes)
        return content

    @property
    def source(self) -> str:
        """Where the rows are from, for messages."""
        return self.files[0] if self.files else "the hub"


@dataclass(frozen=True)
class Place:
    """Names the file and the row of a row of a table, looked up when it is printed."""

    table: Table
    index: int

    def __str__(self) -> str:
        first = 0
        for file in self.table.files if self.table.source.endswith(".parquet") else ():
            import pyarrow.parquet as pq  # type: ignore[import-untyped]

            count = pq.ParquetFile(file).metadata.num_rows
            if self.index < first + count:
                return f"row {self.index - first} of {file}"
            first += count
        return f"row {self.index} of {self.table.source}"


def split_files(
    root: Path,
    split: Split,
    formats: Collection[str] = TEXTS,
    *,
    paths: Iterable[Path] | None = None,
) -> tuple[str, list[str]] | None:
    """The `datasets` builder and the files of a split below `root`, None where there are none.

    The name of a file decides: a word in it is the name of a split, as in `train-00000.parquet`,
    `wiki.valid.raw`, `c4-validation.00000-of-00008.json.gz`. A file whose name has no such word
    belongs to the innermost folder below `root` that is called like a split, as `test/a.txt`.
    Files and folders whose names begin with a dot are skipped.

    Args:
        formats: endings of files that can hold what is wanted; all other files are skipped, and
            ImageNet's own archives, which lie beside what was unpacked from them.
        paths: below `root`, to look at instead of all of them.

    Raises:
        UserError: there are two candidates: files that are no shards of each other, or a name with
            the words of two splits.
    """
    candidates: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(root.rglob("*") if paths is None else paths):
        place = path.relative_to(root)
        hidden = any(part.startswith(".") for part in place.parts)
        suffixes = [suffix.lower() for suffix in path.suffixes]
        packing = suffixes.pop() if suffixes and suffixes[-1] in PACKINGS else ""
        suffix = suffixes[-1] if suffixes else ""
        if hidden or suffix not in formats or path.name.startswith(OWN_ARCHIVE):
            continue
        if not path.is_file():
            continue
        named = _splits(set(re.split("[^a-z]+", path.name.lower())))
        if len(named) > 1 and split in named:
            raise UserError(
                f"dataset.root: expected the name of one split in each file name, got {path}"
            )
        folder: tuple[str, ...] = place.parts[:-1]
        # Shards differ in their numbers only, and say alike how many they are.
        stem = re.sub(r"(of-\d+)|\d+", lambda match: match[1] or "#", path.name.lower())
        while not named and folder:
            named, stem = _splits({folder[-1].lower()}), f"*{suffix}{packing}"
            folder = folder if named else folder[:-1]
        if named == {split}:
            candidates.setdefault((suffix, *folder, stem), []).append(str(path))
    if len(candidates) > 1:
        found = sorted(str(Path(files[0]).relative_to(root)) for files in candidates.values())
        raise UserError(
            f"dataset.root: expected one copy of the {split} files, got {len(found)} in {root}: "
            f"{', '.join(found[:8])}"
        )
    for (suffix, *_), files in candidates.items():
        return BUILDERS[suffix], files
    return None


def _splits(words: set[str]) -> set[str]:
    return {split for split, names in SPLIT_NAMES.items() if names & words}


def files_of(root: Path, split: Split, formats: Collection[str] = TEXTS) -> tuple[str, list[str]]:
    """What `split_files` finds.

    Raises:
        UserError: nothing, or an empty file.
    """
    found = split_files(root, split, formats)
    if found is None:
        names = "|".join(sorted(SPLIT_NAMES[split]))
        raise UserError(
            f"dataset.root: expected a folder with {split} files (names with {names} ending in "
            f"{' '.join(formats)}, .gz allowed), got {root}"
        )
    builder, files = found
    for file in files:
        with reading("dataset.root", Path(file), f"a readable {split} {builder} file"):
            if os.path.getsize(file) == 0:
                raise EOFError
            if builder == "json":
                _require_row(file)
    return found


def _require_row(file: str) -> None:
    """Raise a `ValueError` unless a JSON file begins with a row: pyarrow dies of `null`."""
    if file.endswith(".zst"):
        return
    with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as content:
        start = content.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    if not start.startswith((b"{", b"[")):
        raise ValueError("it does not begin with a row of JSON")


def load_files(root: Path, split: Split, formats: Collection[str] = TEXTS) -> Table:
    """The rows of a split found by `split_files`, cached as Arrow below `cache_folder()`.

    Raises:
        UserError: the split has no file or no row, or a file cannot be read.
    """
    builder, files = files_of(root, split, formats)
    try:
        rows = _load(builder, files)
    except Exception:
        for file in files:  # which one is it?
            with reading("dataset.root", Path(file), f"a readable {split} {builder} file"):
                for _ in opened(builder, file):
                    pass
        # None of them, so that what is damaged is our own copy.
        with reading("dataset.root", root, f"readable {split} {builder} files"):
            rows = _load(builder, files, download_mode="force_redownload")
    require(len(rows) > 0, "dataset.root", f"none in {files[0]}", f"rows of the {split} split")
    say(f"{split}: {len(files)} {builder} file(s), {len(rows):,} rows, from {files[0]}")
    return Table(rows, tuple(files))


def opened(builder: str, file: str) -> "datasets.IterableDataset":
    """The rows of a file, as they are read from it."""
    rows: datasets.IterableDataset = _load(builder, [file], streaming=True)
    return rows


def _load(builder: str, files: list[str], **options: object) -> Any:
    import datasets

    if builder == "text":
        options["keep_linebreaks"] = True  # a line break is a token of the text
    return datasets.load_dataset(
        builder,
        data_files=files,
        split="train",
        cache_dir=str(cache_folder() / "datasets"),
        **options,
    )


def load_hub(
    path: str, *, name: str | None, split: Split, files: Sequence[str] | None = None
) -> Table:
    """A split of a data set on the hub, downloaded once into the hub's own cache.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    import datasets

    require_hub("dataset.root", f"a local copy of {path}")
    try:
        rows = datasets.load_dataset(
            path,
            name,
            # Naming files makes one split of them, called train.
            split="train" if files else split,
            data_files=list(files) if files else None,
        )
    except Exception as error:  # of the hub, of httpx, of datasets: what matters is the line
        raise UserError(
            f"dataset.root: expected a local copy of {path}, got None; the hub did not give it "
            f"({reason(error)}), accept its terms and log in if it asks"
        ) from error
    say(f"{split}: {len(rows):,} rows of {path}, from the hub")
    return Table(rows)


def require_columns(rows: "datasets.Dataset", *names: str) -> None:
    """Raises a `UserError` unless a table has these columns."""
    for name in names:
        have = rows.column_names
        require(name in have, "dataset.root", f"only {', '.join(have)}", f"a column {name!r}")


def require_hub(key: str, instead: str) -> None:
    """Asks once whether the hub answers, where its libraries would retry for half a minute.

    Args:
        key: whose null asks for the hub.
        instead: what to set it to, to do without.

    Raises:
        UserError: it does not answer.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:  # the user says so: only the hub's cache is read
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # httpx or requests, as the hub's version has it
        raise UserError(
            f"{key}: expected {instead}, got None; {constants.ENDPOINT} cannot be reached "
            f"({reason(error)}), set HF_HUB_OFFLINE=1 if the hub's cache has it"
        ) from error
