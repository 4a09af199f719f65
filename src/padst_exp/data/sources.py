"""Where rows come from: local files of any common format, or the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from padst_exp.cache import cache_folder
from padst_exp.errors import UserError, require

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
}
HUB_TIMEOUT_S = 5


def existing(path: str, key: str) -> Path:
    """The path, expanded.

    Raises:
        UserError: it does not exist.
    """
    found = Path(path).expanduser()
    require(found.exists(), f"dataset.{key}", path, "an existing file or folder")
    return found


def split_files(root: Path, split: Split) -> tuple[str, list[str]] | None:
    """The `datasets` builder and the files of a split below `root`, None where there are none.

    A file belongs to a split if a word of its path below `root` names it: `train-00000.parquet`,
    `wiki.valid.raw`, `en/c4-validation.00000-of-00008.json.gz`, `test/a.txt`. Of several formats,
    the first in `BUILDERS` is taken.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*")):
        suffix = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
        words = set(re.split("[^a-z]+", str(path.relative_to(root)).lower()))
        if suffix in BUILDERS and words & SPLIT_NAMES[split]:
            found.setdefault(BUILDERS[suffix], []).append(str(path))
    for builder in BUILDERS.values():
        if builder in found:
            return builder, found[builder]
    return None


def load_files(root: Path, split: Split) -> "datasets.Dataset":
    """The rows of a split found by `split_files`, cached as Arrow below `cache_folder()`.

    Raises:
        UserError: the split has no file, or one cannot be read.
    """
    import datasets

    found = split_files(root, split)
    if found is None:
        names = "|".join(sorted(SPLIT_NAMES[split]))
        raise UserError(
            f"dataset.root: expected a folder with {split} files (names with {names} ending in "
            f"{' '.join(BUILDERS)}, .gz allowed), got {root}"
        )
    builder, files = found
    # A line break is a token of the text.
    options = {"keep_linebreaks": True} if builder == "text" else {}
    try:
        return datasets.load_dataset(
            builder,
            data_files=files,
            split="train",
            cache_dir=str(cache_folder() / "datasets"),
            **options,
        )
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(
            f"dataset.root: expected readable {split} {builder} files, got {root} "
            f"({first_line(cause)})"
        ) from error


def load_hub(
    path: str, *, name: str | None, split: Split, files: Sequence[str] | None = None
) -> "datasets.Dataset":
    """A split of a data set on the hub, downloaded once into the hub's own cache.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    import datasets

    require_hub("dataset.root", f"a local copy of {path}")
    try:
        return datasets.load_dataset(
            path,
            name,
            # Naming files makes one split of them, called train.
            split="train" if files else split,
            data_files=list(files) if files else None,
        )
    except Exception as error:  # of the hub, of httpx, of datasets: what matters is the line
        raise UserError(
            f"dataset.root: expected a local copy of {path}, got None; the hub did not give it "
            f"({first_line(error)}), accept its terms and log in if it asks"
        ) from error


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
            f"({first_line(error)}), set HF_HUB_OFFLINE=1 if the hub's cache has it"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
