"""The accuracy that a configuration reaches, as far as results/tables holds one."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

NOT_MEASURED = "not measured at this configuration"

# What the demos of demo_accuracy.csv train (conf/config.yaml and scripts/bench_accuracy.py); the
# table itself does not say.
DEMOS = {
    "digits": ("nm group=16", 0.1),
    "fashion_mnist": ("nm group=16", 0.1),
    "shakespeare": ("block size=16", 0.2),
}
UNITS = {"top1": "% top-1", "perplexity": " perplexity"}
# Budgets round to whole units, so that densities of other shapes differ a little.
TOLERANCE = 0.15


class _Result(NamedTuple):
    structure: str
    density: float
    permuted: bool
    dataset: str
    metric: str
    seed: str
    value: float


class Accuracies:
    """Looks accuracies up by structure, density and scope.

    Args:
        tables: folder of CSV files with one row per run; those that name a structure, a density,
            a data set, a metric and a value are read, and the demos' table. May not exist.
    """

    def __init__(self, tables: Path) -> None:
        self._results: list[_Result] = []
        for path in sorted(tables.glob("*.csv")):
            with path.open(newline="") as file:
                self._results += [found for row in csv.DictReader(file) if (found := _read(row))]

    def of(self, structure: str, density: float, scope: str) -> str:
        """Every accuracy measured at a configuration, or that there is none.

        Args:
            structure: as `configurations.describe` names it.
            density: of the sparse layers.
            scope: "all", or another one, at which nothing was measured.
        """
        # By seed: a run can stand in more than one table.
        values: dict[tuple[str, str, bool], dict[str, float]] = defaultdict(dict)
        for result in self._results:
            near = abs(result.density - density) <= TOLERANCE * density
            if scope == "all" and result.structure == structure and near:
                values[result.dataset, result.metric, result.permuted][result.seed] = result.value
        texts = []
        for (dataset, metric, permuted), found in sorted(values.items()):
            mean = f"{statistics.mean(found.values()):.1f}{UNITS.get(metric, f' {metric}')}"
            how = "learned permutations, " if permuted else ""
            seeds = "1 seed" if len(found) == 1 else f"{len(found)} seeds"
            texts.append(f"{mean} on {dataset} (demo, {how}{seeds})")
        return "; ".join(texts) or NOT_MEASURED


def _read(row: dict[str, str]) -> _Result | None:
    """What a row says; None where it is about something else, or failed."""
    if not all(row.get(key) for key in ("dataset", "metric", "value")):
        return None
    if row.get("structure") and row.get("density"):
        structure, density = row["structure"], float(row["density"])
        permuted = row.get("permutation") != "NoPermutation"
    elif row.get("model") == "demo" and row["dataset"] in DEMOS:
        (structure, density), permuted = DEMOS[row["dataset"]], True
    else:
        return None
    value = float(row["value"])
    seed = row.get("seed", "")
    return _Result(structure, density, permuted, row["dataset"], row["metric"], seed, value)
