"""Numbers that papers print, beside which ours stand: results/paper/published.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from padst_exp.files import one_line, read_text, reading

COLUMNS = (
    "paper", "table", "model", "dataset", "metric", "method", "sparsity", "value", "spread",
    "seeds", "note",
)  # fmt: skip
# What the papers call an option of the group `model`.
MODELS = {
    "vit": "vit_b16",
    "vit_large": "vit_l16",
    "mixer": "mixer_s16",
    "gpt2": "gpt2_small",
}
NEAR = 1e-9


@dataclass(frozen=True)
class Published:
    """One number of a paper, with what is unclear about it in `note`."""

    paper: str
    table: str
    model: str
    dataset: str
    metric: str
    method: str
    sparsity: float
    value: float
    seeds: str
    note: str

    @property
    def source(self) -> str:
        """Paper and table, short."""
        return f"{self.paper.partition(' (')[0]}, {self.table}"


def read(path: Path) -> list[Published]:
    """All published numbers; none where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return []
    text = read_text("published", path, "a table of published numbers")
    with reading("published", path, f"a table with the columns {', '.join(COLUMNS)}"):
        return [
            Published(
                **{key: one_line(row[key]) for key in Published.__annotations__
                   if key not in ("sparsity", "value")},
                sparsity=float(row["sparsity"]), value=float(row["value"]),
            )
            for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)
        ]  # fmt: skip


def matching(
    table: Sequence[Published],
    *,
    model: str,
    dataset: str,
    metric: str,
    method: str,
    sparsity: float,
) -> list[Published]:
    """The numbers of one method on one model at one sparsity.

    Args:
        table: from `read`.
        model: an option of the group `model`.
        dataset: of the group `dataset`. Numbers on it alone are returned, if there are any; else
            those on others, which our number must not be subtracted from.
        metric: e.g. "top1"; that of averaged weights counts as the same.
        method: as `store.method` says it.
        sparsity: share of zeros; of a dense model it does not matter.
    """
    names = {model, MODELS.get(model, model)}
    wanted = metric.removeprefix("ema_")
    found = [
        row for row in table
        if row.model in names and row.metric == wanted and method and row.method == method
        and (method == "dense" or abs(row.sparsity - sparsity) < NEAR)
    ]  # fmt: skip
    return [row for row in found if row.dataset == dataset] or found
