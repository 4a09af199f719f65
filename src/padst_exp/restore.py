"""A trained model from its run or from an export: what `evaluate` and `export` start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from padst_exp import dispatch, stored
from padst_exp.config import build
from padst_exp.data.task import Task
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.engine.settings import Trainer
from padst_exp.errors import UserError
from padst_exp.files import read_text, reading
from padst_exp.inference import load
from padst_exp.inference.files import DESCRIPTION, read_description
from padst_exp.sparsify import Report
from padst_exp.train import build_experiment, build_task, original, run_settings

TRAINING_CONFIG = "a training config"


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


def plain_model(cfg: DictConfig, task: Task) -> nn.Module:
    """The dense model of `cfg` for the data of `task`, with weights to be replaced."""
    settings = run_settings(cfg)
    transform = build(cfg.transform, "transform")
    model: nn.Module = transform(
        original(cfg, task), settings.sparsity, settings.distribution
    ).model
    return model


def restore_run(
    path: Path, world: World, *, trust: str | Sequence[str] = (), changes: Sequence[str] = ()
) -> RestoredRun:
    """The model of the best checkpoint of a run (of the last one where none is the best yet).

    Where the run keeps a moving average of its weights, the model has these.

    Args:
        path: run directory, or one checkpoint file.
        world: of this process.
        trust: packages other than ours whose constructors its config may name.
        changes: overrides of keys that change no weight, see `stored.change`.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or it names constructors
            that are not trusted.
    """
    run: Path | None = path
    if path.is_file():
        folder = path.resolve().parent.parent
        run = folder if (folder / "config.yaml").is_file() else None
    elif not (path / "config.yaml").is_file():
        raise UserError(f"run: {path} is no run directory, it has no config.yaml")
    else:
        best, last = path / "checkpoints" / "best.pt", path / "checkpoints" / "last.pt"
        path = best if best.exists() else last
    saved = checkpoint.read(path)
    if run is None:
        cfg = _config(saved.get("config_text"), path, trust, changes)
    else:
        file = run / "config.yaml"
        text = read_text("run", file, TRAINING_CONFIG, most=stored.MOST_BYTES)
        cfg = _config(text, file, trust, changes)
    experiment = build_experiment(cfg, world)
    model = experiment.model.to(world.device, experiment.trainer.dtype)
    averaged = saved["average"] is not None
    checkpoint.load_weights(model, saved["average" if averaged else "model"], path)
    # As in training; what was measured on another device proves nothing here.
    picks = dispatch.restore(saved["backends"], model, world.device)
    if picks is None:
        dispatch.forced(model, "torch", world.device)
    else:
        dispatch.reuse(model, picks)
    return RestoredRun(
        config=cfg,
        run=run,
        path=path,
        step=int(saved["step"]),
        averaged=averaged,
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
    try:
        run_settings(cfg)
    except UserError as error:
        raise UserError(f"run: expected {TRAINING_CONFIG}, got {where} ({error})") from error
    # All weights come from the run's own checkpoint, wherever they started.
    for key, value in (("pretrained", False), ("checkpoint", None)):
        if key in cfg.model:
            cfg.model[key] = value
    stored.change(cfg, changes)
    return cfg
