"""The accuracy that a configuration reaches, as far as results/tables holds one."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from padst_exp.bench.configurations import describe
from padst_exp.config import build, config_dir
from padst_exp.structures import Structure

NOT_MEASURED = "not measured at this configuration"

# What the demos of demo_accuracy.csv change in conf/config.yaml; the table itself does not say.
DEMOS = {
    "digits": ("demo ViT", ()),
    "fashion_mnist": ("demo ViT", ()),
    "shakespeare": ("demo GPT-2", ("structure=block", "sparsity=0.8")),
}
UNITS = {"top1": "% top-1", "perplexity": " perplexity"}
# Overrides under which a run's sparse layers are not simply all block linears at one density.
OTHER_SCOPES = ("sparse", "distribution")


@dataclass(frozen=True)
class Configuration:
    """What an accuracy depends on, as speed rows name it."""

    structure: str
    density: float
    scope: str


class Accuracies:
    """Looks accuracies up by configuration.

    Args:
        tables: folder of CSV files, one row per run; may not exist.
    """

    def __init__(self, tables: Path) -> None:
        found: dict[Configuration, dict[tuple[str, str, str], list[float]]]
        found = defaultdict(lambda: defaultdict(list))
        for path in sorted(tables.glob("*.csv")):
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    known = _read(row)
                    if known is not None:
                        configuration, what, value = known
                        found[configuration][what].append(value)
        self._found = found

    def of(self, structure: str, density: float, scope: str) -> str:
        """Every accuracy measured at a configuration, or that there is none.

        Args:
            structure: as `configurations.describe` names it.
            density: asked for.
            scope: "all" or "dense_qkv".
        """
        known = self._found.get(Configuration(structure, round(density, 6), scope))
        if not known:
            return NOT_MEASURED
        return "; ".join(
            f"{statistics.mean(values):.1f}{UNITS.get(metric, f' {metric}')} on {dataset} "
            f"({model}, {len(values)} seeds)"
            for (dataset, model, metric), values in sorted(known.items())
        )


def _read(row: dict[str, str]) -> tuple[Configuration, tuple[str, str, str], float] | None:
    """Configuration, (data set, model, metric) and value of a row; None where one is missing."""
    if not row.get("value") or not row.get("metric") or not row.get("dataset"):
        return None
    model = row.get("model", "")
    if "structure" in row:
        overrides = row.get("overrides", "").split()
        overrides += [f"structure={row['structure']}", f"sparsity={row['sparsity']}"]
    elif model == "demo" and row["dataset"] in DEMOS:
        model, demo = DEMOS[row["dataset"]]
        overrides = list(demo)
    else:
        return None
    configuration = _configuration(overrides)
    if configuration is None:
        return None
    return configuration, (row["dataset"], model, row["metric"]), float(row["value"])


def _configuration(overrides: list[str]) -> Configuration | None:
    """What a training with `overrides` of conf/config.yaml trains; None for other scopes."""
    run = _load("config")
    (option,) = [group["structure"] for group in run.defaults if "structure" in group]
    sparsity = float(run.sparsity)
    own: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+~").partition(".")[0] in OTHER_SCOPES:
            return None
        if key == "structure":
            option = value
        elif key == "sparsity":
            sparsity = float(value)
        elif key.startswith("structure."):
            own.append(override.removeprefix("structure."))
    cfg = OmegaConf.merge(_load(f"structure/{option}"), OmegaConf.from_dotlist(own))
    assert isinstance(cfg, DictConfig)
    built: Structure = build(cfg, "structure")
    return Configuration(describe(built), round(1 - sparsity, 6), "all")


def _load(name: str) -> DictConfig:
    cfg = OmegaConf.load(config_dir() / f"{name}.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg
