"""Train a sparse model: `python -m padst_exp.train [group=option] [key=value] ...`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from padst_exp.cli import command_line
from padst_exp.config import build, results_config, run_name, run_settings

if TYPE_CHECKING:  # the command line must answer --help before torch is imported
    from torch import nn

    from padst_exp.data.task import Task
    from padst_exp.dst import Algorithm
    from padst_exp.engine.distributed import World
    from padst_exp.engine.run_directory import RunDirectory
    from padst_exp.engine.settings import Trainer
    from padst_exp.permutations import PermutationLearner
    from padst_exp.sparsify import Report


@command_line("config")
def main(cfg: DictConfig) -> None:
    """Build what the config names, train it, say where the results are."""
    settings = run_settings(cfg)

    from padst_exp.engine import distributed
    from padst_exp.engine.progress import say

    world = distributed.start(settings.device)
    try:
        directory, summary = train(cfg, world)
    finally:
        world.close()
    if world.main:
        name, value = summary["monitor"], summary["final"][summary["monitor"]]
        say(f"{name} {value:.4g}, density of layers {summary['density_of_layers']:.4f}")
        say(f"results in {directory}")


def train(
    cfg: DictConfig,
    world: World,
    *,
    directory: Callable[[int], RunDirectory] | None = None,
    prepare: Callable[[nn.Module], object] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Run one training; the run directory and its summary.

    A run that is finished already is not repeated under `resume=auto`.

    Args:
        cfg: the composed config.
        world: from `distributed.start`.
        directory: makes the run directory, given how many checkpoints to keep; by default the
            one that `cfg` names, which needs a running Hydra job.
        prepare: what else to do to the sparse model before it is trained.
    """
    from padst_exp.dispatch import require_device
    from padst_exp.engine.experiment import Experiment
    from padst_exp.engine.loop import run
    from padst_exp.engine.progress import say

    settings = run_settings(cfg)
    require_device(settings.backend, world.device)
    task = build_task(cfg, world)
    algorithm = build(cfg.dst, "dst")
    learner = build(cfg.permutation, "permutation")
    optimizer = build(cfg.optimizer, "optimizer")
    trainer = build(cfg.trainer, "trainer")
    logger = build(cfg.logger, "logger")
    model, report = sparse_model(cfg, task, learner, algorithm)
    experiment = Experiment(
        task=task,
        model=model,
        report=report,
        algorithm=algorithm,
        learner=learner,
        optimizer=optimizer,
        trainer=trainer,
        logger=logger,
        seed=settings.seed,
        backend=settings.backend,
    )
    if prepare is not None:
        prepare(model)
    folder = directory(trainer.keep_last) if directory else run_directory(cfg, world, trainer)
    if folder.finished:
        if world.main:
            say("finished before; resume=never trains again")
        return folder.path, folder.summary()
    if world.main:
        say(
            f"{len(report.layers)} sparse weights keep {report.density('layers'):.2%} of their "
            f"entries, {report.density('model'):.2%} of the model's parameters remain; "
            f"{experiment.total_steps} steps on {world.device}, in {folder.path}"
        )
    return folder.path, run(experiment, folder, world)


def build_task(cfg: DictConfig, world: World) -> Task:
    """The data set of `cfg`. Rank 0 prepares what is cached on disk, the others then find it."""
    task = build(cfg.dataset, "dataset") if world.main else None
    world.from_main(None)
    return build(cfg.dataset, "dataset") if task is None else task


def sparse_model(
    cfg: DictConfig, task: Task, learner: PermutationLearner, algorithm: Algorithm
) -> tuple[nn.Module, Report]:
    """The model of `cfg` for the data of `task`, its layers sparse, and what was done to it.

    Pretrained weights keep their largest units and their scale; fresh ones start from a random
    topology with rows scaled to their fan-in.
    """
    import torch

    from padst_exp.sparsify import Rule, sparsify

    settings = run_settings(cfg)
    torch.manual_seed(settings.seed)
    model = build(cfg.model, "model", task.model_shape)
    pretrained = bool(cfg.model.get("pretrained")) or cfg.model.get("checkpoint") is not None
    report = sparsify(
        model,
        [Rule(rule.pattern, rule.split) for rule in settings.sparse],
        structure=build(cfg.structure, "structure"),
        density=1 - settings.sparsity,
        distribution=settings.distribution,
        learner=learner,
        algorithm=algorithm,
        storage=settings.storage,
        topology="magnitude" if pretrained else "random",
        rescale=not pretrained,
        seed=settings.seed,
    )
    return model, report


def run_directory(cfg: DictConfig, world: World, trainer: Trainer) -> RunDirectory:
    """The folder of this run, made (or found again) by rank 0 and known to all."""
    from padst_exp.engine.run_directory import RunDirectory

    config = results_config(cfg)
    text = OmegaConf.to_yaml(cfg, resolve=True)
    hydra = HydraConfig.get()

    def make() -> Path:
        return RunDirectory.create(
            Path(cfg.runs),
            run_name(cfg, hydra.runtime.choices),
            resume=cfg.resume,
            config=config,
            config_text=text,
            overrides=list(hydra.overrides.task),
            device=str(world.device),
            keep_last=trainer.keep_last,
        ).path

    path = world.from_main(make() if world.main else None)
    assert path is not None
    return RunDirectory(path, config=config, config_text=text, keep_last=trainer.keep_last)


if __name__ == "__main__":
    main()
