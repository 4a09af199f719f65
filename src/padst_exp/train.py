"""Train a sparse model: `python -m padst_exp.train [group=option] [key=value] ...`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from padst_exp.cli import command_line
from padst_exp.config import build, results_config, run_name, run_settings

if TYPE_CHECKING:  # the command line must answer --help before torch is imported
    from torch import nn

    from padst_exp.data.task import Task
    from padst_exp.engine.distributed import World
    from padst_exp.engine.experiment import Experiment
    from padst_exp.engine.run_directory import RunDirectory
    from padst_exp.transforms import Original


@command_line("config")
def main(cfg: DictConfig) -> None:
    """Build what the config names, train it, say where the results are."""
    settings = run_settings(cfg)

    from padst_exp.dispatch import require_device
    from padst_exp.engine import distributed
    from padst_exp.engine.loop import run
    from padst_exp.engine.progress import say

    world = distributed.start(settings.device)
    try:
        require_device(settings.backend, world.device)
        experiment = build_experiment(cfg, world)
        directory = open_directory(cfg, world)
        summary = run(experiment, directory, world)
    finally:
        world.close()
    if world.main:
        name, value = summary["monitor"], summary["final"][summary["monitor"]]
        say(f"{name} {value:.4g}, density of layers {summary['density_of_layers']:.4f}")
        say(f"results in {directory.path}")


def build_experiment(cfg: DictConfig, world: World) -> Experiment:
    """Everything that `cfg` names: data, a sparse model, and how to train it.

    Pretrained weights keep their largest units and their scale; fresh ones start from a random
    topology with rows scaled to their fan-in.

    Args:
        cfg: composed config of a training.
        world: of this process.

    Raises:
        UserError: in one line that names the key.
    """
    from padst_exp.engine.experiment import Experiment
    from padst_exp.sparsify import sparsify

    settings = run_settings(cfg)
    task = build_task(cfg, world)
    algorithm = build(cfg.dst, "dst")
    learner = build(cfg.permutation, "permutation")
    optimizer = build(cfg.optimizer, "optimizer")
    trainer = build(cfg.trainer, "trainer")
    logger = build(cfg.logger, "logger")

    transform = build(cfg.transform, "transform")
    transformed = transform(original(cfg, task), settings.sparsity, settings.distribution)
    pretrained = bool(cfg.model.get("pretrained")) or cfg.model.get("checkpoint") is not None
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
        topology="magnitude" if pretrained else "random",
        rescale=not pretrained,
        seed=settings.seed,
        baseline=transformed.baseline,
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
    task = build(cfg.dataset, "dataset") if world.main else None
    world.from_main(None)
    return build(cfg.dataset, "dataset") if task is None else task


def original(cfg: DictConfig, task: Task) -> Original:
    """The dense model of `cfg` for the data of `task`, as transforms take it."""
    import torch

    from padst_exp.sparsify import Rule
    from padst_exp.transforms import Original, example

    settings = run_settings(cfg)

    def dense(changes: Mapping[str, object]) -> nn.Module:
        torch.manual_seed(settings.seed)
        node = OmegaConf.create({**cfg.model, **changes})
        model: nn.Module = build(node, "model", task.model_shape)
        return model

    return Original(
        build=dense,
        keys={str(key): value for key, value in cfg.model.items() if key != "_target_"},
        rules=[Rule(rule.pattern, rule.split) for rule in settings.sparse],
        inputs=example(task.model_shape),
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
    main()
