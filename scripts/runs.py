"""Whole trainings for the scripts beside this file, in folders that vanish."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from torch import nn

from padst_exp.config import config_dir, results_config
from padst_exp.engine.distributed import World
from padst_exp.engine.loop import run
from padst_exp.engine.run_directory import RunDirectory
from padst_exp.train import build_experiment

FASHION = [
    *("dataset=fashion_mnist", "dataset.shift=0", "dataset.flip=false", "model.patch_size=7"),
    *("model.dim=128", "model.depth=4", "model.heads=4", "trainer.epochs=null"),
    *("trainer.batch_size=64", "optimizer.lr=0.002"),
]


def compose(*overrides: str) -> DictConfig:
    """The configuration of a training, without a logger."""
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose("config", ["logger=none", *overrides])


@contextmanager
def training(
    cfg: DictConfig, prepare: Callable[[nn.Module], object] | None = None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The run directory and the summary of a whole training; the directory goes on leaving."""
    world = World()
    with tempfile.TemporaryDirectory() as folder:
        experiment = build_experiment(cfg, world)
        if prepare is not None:
            prepare(experiment.model)
        directory = RunDirectory.open(
            Path(folder), "bench", world, resume="never", config=results_config(cfg),
            config_text="", overrides=[],
        )  # fmt: skip
        yield directory.path, run(experiment, directory, world)
