"""Whole trainings for the scripts beside this file, in folders that vanish, and their tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from padst_exp.bench import tables
from padst_exp.config import config_dir, results_config
from padst_exp.engine.distributed import World
from padst_exp.engine.loop import run
from padst_exp.engine.run_directory import RunDirectory, environment
from padst_exp.train import build_experiment

Row = dict[str, Any]
FASHION = ["dataset=fashion_mnist", "dataset.shift=0", "dataset.flip=false", "model.patch_size=7"]
# Entries of conf/bench.yaml: what is timed is trained, too.
STRUCTURES: list[Row] = OmegaConf.to_container(
    OmegaConf.load(config_dir() / "bench.yaml").suites.layers.structures
)  # type: ignore[assignment]


def overrides_of(entry: Row) -> list[str]:
    """How the command line of a training names an entry of conf/bench.yaml."""
    keys = {key: value for key, value in entry.items() if key not in ("structure", "permutations")}
    plain = ["permutation=none"] if entry.get("permutations") == ["none"] else []
    chosen = [f"structure.{key}={value}" for key, value in keys.items()]
    return [f"structure={entry['structure']}", *chosen, *plain]


def compose(*overrides: str) -> DictConfig:
    """The configuration of a training, without a logger and evaluations on the way."""
    quiet = ["logger=none", "trainer.eval_interval=null"]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose("config", [*quiet, *overrides])


@contextmanager
def training(
    cfg: DictConfig, prepare: Callable[[nn.Module], object] = lambda model: None
) -> Iterator[tuple[Path, Row]]:
    """The run directory and the summary of a whole training; the directory goes on leaving."""
    world = World()
    with tempfile.TemporaryDirectory() as folder:
        experiment = build_experiment(cfg, world)
        prepare(experiment.model)
        directory = RunDirectory.open(
            Path(folder), "bench", world, resume="never", config=results_config(cfg),
            config_text="", overrides=[],
        )  # fmt: skip
        yield directory.path, run(experiment, directory, world)


def write(name: str, rows: list[Row]) -> None:
    """Write a table of results/tables, with where it was measured."""
    path = Path(__file__).parents[1] / "results" / "tables" / f"{name}.csv"
    tables.write(path, rows, **measured_where())


def measured_where() -> Row:
    """The columns that say by which code, and on what, a row was measured."""
    run = environment("cpu")
    where = {"commit": run["git_commit"], "dirty": run["git_dirty"], "device": run["device"]}
    return where | {
        "threads": torch.get_num_threads(), "torch": torch.__version__.partition("+")[0]
    }  # fmt: skip
