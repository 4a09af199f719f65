"""Train a sparse model: `python -m padst_exp.train [group=option] [key=value] ...`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pydantic import with_config

from padst_exp.cli import command_line
from padst_exp.config import (
    GROUPS,
    Device,
    build,
    read_keys,
    require_fit,
    require_sparsity,
    resolve_target,
    results_config,
    run_name,
)
from padst_exp.engine.interruption import ending_at_once
from padst_exp.errors import UserError, require
from padst_exp.messages import outlive_readers, say

if TYPE_CHECKING:  # the command line must answer --help before torch is imported
    from torch import nn

    from padst_exp.data.task import Task
    from padst_exp.engine.distributed import World
    from padst_exp.engine.experiment import Experiment
    from padst_exp.engine.run_directory import RunDirectory
    from padst_exp.transforms import Original


# File systems take 255; a suffix tells runs of one name apart.
LONGEST_NAME = 200


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class SparseRule:
    """Layers to make sparse.

    Args:
        pattern: shell-style pattern over module names.
        split: how many projections a layer fuses on its output (3 for QKV).
    """

    pattern: str
    split: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's own keys; everything else is one constructor call in a config group.

    Args:
        sparse: which layers are sparse; the model's file says so.
        sparsity: share of zeros in these layers, in [0, 1).
        distribution: how the layers share it: "uniform", "erk", or a mapping from patterns on
            module names to sparsities.
        low_rank: rank of the dense companion of every sparse layer, 0 for none.
        storage: "packed" keeps active entries only, "masked" is the dense reference.
        init_from: trained dense weights to make sparse: a run, a checkpoint, an export, or those
            of timm or transformers; null: fresh ones, or what the model's own keys load.
        init_score: what trained weights choose their units by: their "magnitude", or "saliency",
            which asks the loss.
        init_batches: of training data, for the saliency.
        init_topology: a run whose first units this one takes over.
        init_permutation: a run whose permutations this one takes over, hard from the start.
        init_values: as `init_from`, but units are drawn as for fresh weights.
        seed: of everything random; 0 is a seed like any other.
        resume: "auto" continues from the newest checkpoint of the same run, "never" does not.
        runs: folder that holds the run directories.
        name: of the run directory; null derives it from the config.
        scale: what the data and lengths were chosen for; null in runs of before there were scales.
        arm: of the experiment that this run is for.
        device: "auto" takes the GPU where there is one.
        backend: of sparse products (`padst_kernels.Backend`), or "auto", which measures.
    """

    sparse: tuple[SparseRule, ...]
    sparsity: float
    distribution: Literal["uniform", "erk"] | dict[str, float]
    low_rank: int
    storage: Literal["packed", "masked"]
    init_from: str | None
    init_score: Literal["magnitude", "saliency"]
    init_batches: int
    init_topology: str | None
    init_permutation: str | None
    init_values: str | None
    seed: int
    resume: Literal["never", "auto"]
    runs: str
    name: str | None
    scale: Literal["demo", "small", "paper"] | None
    arm: str | None
    device: Device
    backend: Literal["auto", "native", "torch", "triton", "cuda", "scatter"]

    def __post_init__(self) -> None:
        require_sparsity("sparsity", self.sparsity)
        if isinstance(self.distribution, dict):
            for pattern, sparsity in self.distribution.items():
                require_sparsity(f"distribution.{pattern}", sparsity)
        require(self.low_rank >= 0, "low_rank", self.low_rank, "a rank, or 0 for none")
        for index, rule in enumerate(self.sparse):
            require(rule.split >= 1, f"sparse[{index}].split", rule.split, "at least 1")
        require(self.init_batches >= 1, "init_batches", self.init_batches, "at least 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2^63 - 1")
        if self.name is not None:
            wanted = f"the name of one folder, of at most {LONGEST_NAME} bytes"
            require(_is_folder_name(self.name), "name", repr(self.name), wanted)
        wanted = "a folder (. for this one)"
        require(self.runs == self.runs.strip() != "", "runs", repr(self.runs), wanted)


def _is_folder_name(name: str) -> bool:
    # Nothing that a shell, or a person, would take for something else.
    return (
        any(letter.isalnum() for letter in name)
        and name == name.strip()
        and name[0] != "-"
        and "/" not in name
        and len(name.encode()) <= LONGEST_NAME
    )


def run_settings(cfg: DictConfig) -> Run:
    """The checked run keys of a composed (or reloaded) training config, which has every group."""
    for group in GROUPS:
        if not isinstance(cfg.get(group), DictConfig):
            raise UserError(f"{group}: missing, expected a mapping with a _target_")
    return read_keys(cfg, Run, GROUPS)


@command_line("config")
def main(cfg: DictConfig) -> None:
    """Build what the config names, train it, say where the results are."""
    outlive_readers()
    with ending_at_once():
        train(cfg)


def train(cfg: DictConfig) -> None:
    """Train what `cfg` names, or go on with it."""
    settings = run_settings(cfg)

    from padst_exp.dispatch import require_device
    from padst_exp.engine import distributed
    from padst_exp.engine.loop import run
    from padst_exp.restore import alone

    world = distributed.start(settings.device)
    try:
        require_device(settings.backend, world.device)
        # A run that goes on has everything in its checkpoint; where it started may be gone.
        experiment = build_experiment(alone(cfg) if _goes_on(cfg, world) else cfg, world)
        experiment.require_batches(world)
        directory = open_directory(cfg, world)
        summary = run(experiment, directory, world)
    finally:
        world.close()
    if world.main:
        name = summary["monitor"]
        value = summary["final"][name]  # None, where it is read from a file, for what is no number
        value = math.nan if value is None else value
        say(f"{name} {value:.4g}, density of layers {summary['density_of_layers']:.4f}")
        bad = summary.get("not_finite")
        warning = f", but its last evaluation is not finite ({', '.join(bad)})" if bad else ""
        say(f"results in {directory.path}{warning}")


def build_experiment(cfg: DictConfig, world: World, task: Task | None = None) -> Experiment:
    """Everything that `cfg` names: data, a sparse model, and how to train it.

    Trained weights keep their best units and their scale, also under permutations; fresh ones
    start from a random topology with rows scaled to their fan-in.

    Args:
        cfg: composed config of a training.
        world: of this process.
        task: its data set, where that is there already.

    Raises:
        UserError: in one line that names the key.
    """
    from padst_exp.engine.experiment import Experiment
    from padst_exp.inherit import Inheritance
    from padst_exp.sparsify import sparsify

    settings = run_settings(cfg)
    task = build_task(cfg, world) if task is None else task
    inheritance = Inheritance(cfg=cfg, task=task, world=world)
    inheritance.check()
    taken = inheritance.taken()
    algorithm = build(cfg.dst, "dst")
    learner = build(cfg.permutation, "permutation")
    optimizer = build(cfg.optimizer, "optimizer")
    trainer = build(cfg.trainer, "trainer")
    logger = build(cfg.logger, "logger")

    transform = build(cfg.transform, "transform")
    dense = inheritance.dense(original(cfg, task))
    transformed = transform(dense, settings.sparsity, settings.distribution)
    report = sparsify(
        transformed.model,
        transformed.rules,
        structure=build(cfg.structure, "structure"),
        density=transformed.density,
        distribution=settings.distribution,
        learner=learner,
        algorithm=algorithm,
        low_rank=settings.low_rank,
        storage=settings.storage,
        topology=inheritance.scores(transformed.model, transformed.rules, trainer),
        rescale=not inheritance.trained,
        seed=settings.seed,
        baseline=transformed.baseline,
        taken=taken,
    )
    transform.check(report)
    return Experiment(
        task=task,
        model=transformed.model,
        report=report,
        algorithm=algorithm,
        learner=learner,
        optimizer=optimizer,
        trainer=trainer,
        logger=logger,
        seed=settings.seed,
        backend=settings.backend,
    )


def build_task(cfg: DictConfig, world: World) -> Task:
    """The data set of `cfg`. Rank 0 prepares what is cached on disk, the others then find it."""
    # Before anything is downloaded or searched for.
    require_fit(cfg.model, "model", getattr(resolve_target(cfg.dataset, "dataset"), "gives", ()))
    prepared = world.first(lambda: build(cfg.dataset, "dataset"))
    return build(cfg.dataset, "dataset") if prepared is None else prepared


def original(cfg: DictConfig, task: Task) -> Original:
    """The dense model of `cfg` for the data of `task`, as transforms take it."""
    import torch

    from padst_exp.memory import fitting
    from padst_exp.sparsify import Rule
    from padst_exp.transforms import Original, example

    settings = run_settings(cfg)

    keys = cast(dict[str, object], OmegaConf.to_container(cfg.model, resolve=True))

    def dense(changes: Mapping[str, object]) -> nn.Module:
        torch.manual_seed(settings.seed)
        node = OmegaConf.create({**keys, **changes})
        with fitting("model"):
            model: nn.Module = build(node, "model", task.model_shape)
        return model

    return Original(
        build=dense,
        keys={key: value for key, value in keys.items() if key != "_target_"},
        rules=[Rule(rule.pattern, rule.split) for rule in settings.sparse],
        inputs=example(task.model_shape),
    )


def _goes_on(cfg: DictConfig, world: World) -> bool:
    """Whether there is a checkpoint of this run to continue from. A collective."""
    from padst_exp.engine.run_directory import can_continue

    name = run_name(cfg, HydraConfig.get().runtime.choices)
    return world.from_main(
        world.main and cfg.resume == "auto" and can_continue(Path(cfg.runs), name)
    )


def open_directory(cfg: DictConfig, world: World) -> RunDirectory:
    """The folder of the run that Hydra has just composed `cfg` for, made or found again."""
    from padst_exp.engine.run_directory import RunDirectory

    hydra = HydraConfig.get()
    return RunDirectory.open(
        Path(cfg.runs),
        run_name(cfg, hydra.runtime.choices),
        world,
        resume=cfg.resume,
        config=results_config(cfg),
        config_text=OmegaConf.to_yaml(cfg, resolve=True),
        overrides=list(hydra.overrides.task),
    )


if __name__ == "__main__":
    # What a cluster unpickles must be found by name.
    from padst_exp.train import main as program

    program()
