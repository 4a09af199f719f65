"""A trained model from its run or from an export: what `evaluate` and `export` start from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from padst_exp import dispatch, stored
from padst_exp.config import build
from padst_exp.data.task import Task
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.engine.settings import Trainer
from padst_exp.errors import UserError
from padst_exp.files import one_line, read_text, reading
from padst_exp.inference import load
from padst_exp.inference.files import DESCRIPTION, read_description
from padst_exp.messages import say
from padst_exp.sparsify import Report
from padst_exp.train import build_experiment, build_task, original, run_settings

TRAINING_CONFIG = "a training config"
FRESH: dict[str, Any] = {
    "init_from": None,
    "init_score": "magnitude",
    "init_batches": 1,
    "init_topology": None,
    "init_permutation": None,
    "init_values": None,
}
"""The keys of a run that starts from nothing else."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A trained model with what it was trained on.

    Args:
        config: of the run.
        path: of the checkpoint, or folder of the export.
        task: its data set.
        trainer: its settings.
        model: on the device of this process.
    """

    config: DictConfig
    path: Path
    task: Task
    trainer: Trainer
    model: nn.Module


@dataclass(frozen=True, kw_only=True)
class RestoredRun(Restored):
    """The model of a checkpoint.

    Args:
        run: its directory; None for a checkpoint that was moved out of it.
        step: at which it was written.
        averaged: whether the weights are the moving average.
        report: what is sparse in it.
    """

    run: Path | None
    step: int
    averaged: bool
    report: Report


def restore(
    path: Path, world: World, *, trust: str | Sequence[str] = (), changes: Sequence[str] = ()
) -> Restored:
    """The model of an export, or else of a run as in `restore_run`.

    Raises:
        UserError: there is no such export, run or checkpoint, or it is damaged.
    """
    if path.is_file() and (path.parent / DESCRIPTION).is_file():
        raise UserError(f"run: {path} is one file of an export, give its folder {path.parent}")
    if not (path / DESCRIPTION).is_file():
        return restore_run(path, world, trust=trust, changes=changes)
    text = read_description(path)["config"]
    cfg = _config(text, path / DESCRIPTION, trust, changes)
    task = build_task(cfg, world)
    trainer = build(cfg.trainer, "trainer")
    return Restored(
        config=cfg,
        path=path,
        task=task,
        trainer=trainer,
        model=load(path, world.device, trainer.dtype, plain_model(cfg, task)),
    )


def alone(cfg: DictConfig) -> DictConfig:
    """`cfg` for a run whose weights all come from its own checkpoint, wherever they started."""
    cfg = copy.deepcopy(cfg)
    cfg.update(FRESH)
    for key, value in (("pretrained", False), ("checkpoint", None)):
        if isinstance(cfg.get("model"), DictConfig) and key in cfg.model:
            cfg.model[key] = value
    return cfg


def plain_model(cfg: DictConfig, task: Task) -> nn.Module:
    """The dense model of `cfg` for the data of `task`, with weights to be replaced."""
    settings = run_settings(cfg)
    transform = build(cfg.transform, "transform")
    model: nn.Module = transform(
        original(cfg, task), settings.sparsity, settings.distribution
    ).model
    return model


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A checkpoint that was read, and nothing built of it yet.

    Args:
        config: of the run.
        run: its directory; None for a checkpoint that was moved out of it.
        path: of the checkpoint.
        saved: what it holds.
    """

    config: DictConfig
    run: Path | None
    path: Path
    saved: dict[str, Any]

    @property
    def averaged(self) -> bool:
        """Whether the run keeps a moving average of its weights."""
        return self.saved["average"] is not None

    @property
    def weights(self) -> dict[str, Tensor]:
        """State of the model, of its average where there is one."""
        weights: dict[str, Tensor] = self.saved["average" if self.averaged else "model"]
        return weights


def open_run(
    path: Path, *, trust: str | Sequence[str] = (), changes: Sequence[str] = ()
) -> OpenedRun:
    """Read the best checkpoint of a run (the last one where none is the best yet).

    Args:
        path: run directory, or one checkpoint file.
        trust, changes: as in `restore_run`.

    Raises:
        UserError: as `restore_run`.
    """
    run: Path | None = path
    if path.is_file():
        folder = path.resolve().parent.parent
        run = folder if (folder / "config.yaml").is_file() else None
        saved = checkpoint.read(path)
    elif not (path / "config.yaml").exists():
        raise UserError(f"run: {path} is no run directory, it has no config.yaml")
    else:
        path, saved = checkpoint.read_best(path / "checkpoints")
    if run is None:
        cfg = _config(saved["config_text"], path, trust, changes)
    else:
        file = run / "config.yaml"
        text = read_text("run", file, TRAINING_CONFIG, most=stored.MOST_BYTES)
        cfg = _config(text, file, trust, changes)
    return OpenedRun(config=cfg, run=run, path=path, saved=saved)


def restore_run(
    path: Path,
    world: World,
    *,
    trust: str | Sequence[str] = (),
    changes: Sequence[str] = (),
    task: Callable[[DictConfig], Task | None] = lambda cfg: None,
) -> RestoredRun:
    """The model of the best checkpoint of a run (of the last one where none is the best yet).

    Where the run keeps a moving average of its weights, the model has these.

    Args:
        path: run directory, or one checkpoint file.
        world: of this process.
        trust: packages other than ours whose constructors its config may name.
        changes: overrides of keys that change no weight, see `stored.change`.
        task: gives the data set of its config where that is there already, else None.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or it names constructors
            that are not trusted.
    """
    opened = open_run(path, trust=trust, changes=changes)
    cfg, path, saved = opened.config, opened.path, opened.saved
    experiment = build_experiment(cfg, world, task(cfg))
    data = experiment.task.describe()
    if data != saved["data"]:
        then, now = (
            one_line(", ".join(f"{name} {value}" for name, value in each.items()))
            for each in (saved["data"], data)
        )
        say(f"warning: {path} is of a training on other data: {then} then, {now} now")
    model = experiment.model.to(world.device, experiment.trainer.dtype)
    checkpoint.load_weights(model, opened.weights, path)
    # As in training; what was measured on another device proves nothing here.
    picks = dispatch.restore(saved["backends"], model, world.device)
    if picks is None:
        dispatch.forced(model, "torch", world.device)
    else:
        dispatch.reuse(model, picks)
    return RestoredRun(
        config=cfg,
        run=opened.run,
        path=path,
        step=saved["step"],
        averaged=opened.averaged,
        task=experiment.task,
        trainer=experiment.trainer,
        model=model,
        report=experiment.report,
    )


def _config(
    text: object, where: Path, trust: str | Sequence[str], changes: Sequence[str]
) -> DictConfig:
    """The training config `text`, which a user knows as `where`."""
    with reading("run", where, TRAINING_CONFIG):
        if not isinstance(text, str):
            raise TypeError("its config is no text")
        cfg = stored.parse(text)
    # Before anything else: even the keys of a run are built where they name a constructor.
    stored.require_ours(cfg, where, [trust] if isinstance(trust, str) else trust)
    cfg = alone(cfg)
    for key in ("scale", "arm"):  # older runs have none
        cfg.setdefault(key, None)
    try:
        run_settings(cfg)
    except UserError as error:
        raise UserError(f"run: expected {TRAINING_CONFIG}, got {where} ({error})") from error
    stored.change(cfg, changes)
    return cfg
