"""A trained model from its run or from an export: what `evaluate` and `export` start from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from padst_exp import dispatch, stored
from padst_exp.config import build
from padst_exp.data.task import Task
from padst_exp.engine import checkpoint
from padst_exp.engine.backends import choose_backends
from padst_exp.engine.distributed import World
from padst_exp.engine.folders import is_run
from padst_exp.engine.records import read_summary
from padst_exp.engine.settings import Trainer
from padst_exp.errors import UserError
from padst_exp.files import MOST_YAML, TRAINING_CONFIG, one_line, read_text, reading
from padst_exp.identity import differences, flat, results_part
from padst_exp.inference import load
from padst_exp.inference.files import DESCRIPTION, read_description
from padst_exp.messages import say
from padst_exp.sparsify import Report
from padst_exp.train import AnyBackend, build_experiment, build_task, original, run_settings


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A trained model with what it was trained on.

    Args:
        config: of the run.
        path: of the checkpoint, or folder of the export.
        task: its data set.
        trainer: its settings.
        model: on the device of this process.
        backend: that the user asks for, None where they did not.
    """

    config: DictConfig
    path: Path
    task: Task
    trainer: Trainer
    model: nn.Module
    backend: AnyBackend | None


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
    path: Path,
    world: World,
    *,
    trust: str | Sequence[str] = (),
    changes: Sequence[str] = (),
    task: Callable[[DictConfig], Task | None] = lambda cfg: None,
) -> Restored:
    """The model of an export, or else of a run; both as in `restore_run`.

    Raises:
        UserError: there is no such export, run or checkpoint, or it is damaged.
    """
    if path.is_file() and (path.parent / DESCRIPTION).is_file():
        raise UserError(f"run: {path} is one file of an export, give its folder {path.parent}")
    if not (path / DESCRIPTION).is_file():
        return restore_run(path, world, trust=trust, changes=changes, task=task)
    file = path / DESCRIPTION
    cfg = _ours(_parsed(read_description(path)["config"], file), file, trust)
    cfg = _complete(cfg, file)
    backend = _changed(cfg, changes)
    dispatch.require_device(backend or "auto", world.device)
    data = task(cfg) or build_task(cfg, world)
    trainer = build(cfg.trainer, "trainer")
    return Restored(
        config=cfg,
        path=path,
        task=data,
        trainer=trainer,
        model=load(path, world.device, trainer.dtype, plain_model(cfg, data)),
        backend=backend,
    )


def alone(cfg: DictConfig) -> DictConfig:
    """`cfg` for a run whose weights all come from its own checkpoint, wherever they started."""
    cfg = copy.deepcopy(cfg)
    cfg.update(stored.FRESH)
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
        backend: that the user asks for, None where they did not.
    """

    config: DictConfig
    run: Path | None
    path: Path
    saved: dict[str, Any]
    backend: AnyBackend | None

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

    Its `config.yaml` says where the data are; of a config that is damaged, or of another model than
    the checkpoint's, a line says that the checkpoint's is taken instead.

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
    elif not is_run(path):
        raise UserError(f"run: {path} is no run directory, it has no config.yaml")
    else:
        path, saved = checkpoint.read_best(path / "checkpoints")
    cfg = _parsed(saved["config_text"], path)
    own = None if run is None else _own_config(run / "config.yaml", cfg, path, trust)
    cfg = _complete(_ours(cfg, path, trust) if own is None else own, path)
    backend = _changed(cfg, changes)
    return OpenedRun(config=cfg, run=run, path=path, saved=saved, backend=backend)


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
        task: gives the data set of its config where that is there already, or another one to test
            the model on, else None.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or it names constructors
            that are not trusted.
    """
    opened = open_run(path, trust=trust, changes=changes)
    cfg, path, saved = opened.config, opened.path, opened.saved
    if opened.run is not None and read_summary(opened.run / "summary.json") is None:
        say(f"{opened.run} is not finished: {path.name} is of step {saved['step']}")
    experiment = build_experiment(cfg, world, task(cfg))
    data = experiment.task.describe()
    if experiment.task.for_training and data != saved["data"]:
        then, now = (
            one_line(", ".join(f"{name} {value}" for name, value in each.items()))
            for each in (saved["data"], data)
        )
        say(f"warning: {path} is of a training on other data: {then} then, {now} now")
    model = experiment.model.to(world.device, experiment.trainer.dtype)
    checkpoint.load_weights(model, opened.weights, path)
    if opened.backend is not None:
        dispatch.require_device(opened.backend, world.device)
        choose_backends(experiment, world=world, saved=saved["backends"])
    else:
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
        backend=opened.backend,
    )


def _parsed(text: str, where: Path) -> DictConfig:
    """The training config `text`, which a user knows as `where`."""
    with reading("run", where, TRAINING_CONFIG):
        return stored.parse(text)


def _ours(cfg: DictConfig, where: Path, trust: str | Sequence[str]) -> DictConfig:
    """`cfg`, which names nothing but our own constructors, or what is trusted."""
    stored.require_ours(cfg, where, [trust] if isinstance(trust, str) else trust)
    return cfg


def _own_config(
    file: Path, saved: DictConfig, path: Path, trust: str | Sequence[str]
) -> DictConfig | None:
    """The config in a run's `file`; None, and a line, where the one in its checkpoint is better."""
    there = cast(dict[str, object], OmegaConf.to_container(saved))
    try:
        with reading("run", file, TRAINING_CONFIG):
            cfg = stored.parse(read_text("run", file, TRAINING_CONFIG, most=MOST_YAML))
            here = cast(dict[str, object], OmegaConf.to_container(cfg))
            if missing := sorted(_keys(there) - _keys(here)):
                raise ValueError(f"it has no {missing[0]}")
        _complete(_ours(cfg, file, trust), file)
        for difference in differences(results_part(there), results_part(here)):
            what = f"got {file} ({one_line(difference)})"
            raise UserError(f"run: expected the config of its checkpoint, {what}")
    except stored.ForeignError:  # no damage: somebody has put that there
        raise
    except UserError as error:
        say(f"warning: {error}; taking the one in {path} instead")
        return None
    return cfg


def _keys(config: Mapping[str, object]) -> set[str]:
    """The keys that no config of a run may lack; it may have had another logger, with others."""
    return {*config, *(key for key, _ in flat(config) if not key.startswith("logger."))}


def _complete(cfg: DictConfig, where: Path) -> DictConfig:
    """A training config of `_ours` for a model whose weights are all there, checked."""
    cfg = alone(cfg)
    # Older runs have none of these.
    for key in ("scale", "arm"):
        cfg.setdefault(key, None)
    try:
        run_settings(cfg)
    except UserError as error:
        raise UserError(f"run: expected {TRAINING_CONFIG}, got {where} ({error})") from error
    for key, value in (("profile", None), ("peak_flops", None), ("parallel", "ddp")):
        cfg.trainer.setdefault(key, value)
    return cfg


def _changed(cfg: DictConfig, changes: Sequence[str]) -> AnyBackend | None:
    """Change `cfg` as a user asks; the backend that they ask for by that, if they do."""
    changed = stored.change(cfg, changes)
    return run_settings(cfg).backend if "backend" in changed else None
