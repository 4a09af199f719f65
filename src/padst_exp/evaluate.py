"""Evaluate a run: `python -m padst_exp.evaluate run=<run directory>`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from padst_exp.cli import command_line
from padst_exp.config import EvaluateSchema, build, evaluate_settings
from padst_exp.errors import UserError

if TYPE_CHECKING:  # the command line must answer --help before torch is imported
    from padst_exp.engine.distributed import World


@command_line("evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate the best checkpoint of a run and print its metrics."""
    settings = evaluate_settings(cfg)

    from padst_exp.engine import distributed
    from padst_exp.engine.progress import say

    world = distributed.start(settings.device)
    try:
        path, metrics = evaluate(settings, world)
    finally:
        world.close()
    if world.main:
        say(str(path))
        for name, value in metrics.items():
            say(f"{name} {value:.6g}")


def evaluate(settings: EvaluateSchema, world: World) -> tuple[Path, dict[str, float]]:
    """Metrics of the best checkpoint of a run (the last one where none is the best yet).

    Where the run keeps a moving average of its weights, that is what is evaluated.

    Returns:
        The checkpoint's path and the metrics.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    from padst_exp import dispatch
    from padst_exp.data.sampler import validation_loader
    from padst_exp.engine import checkpoint, evaluation
    from padst_exp.train import build_task, sparse_model

    run = Path(settings.run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"run: {run} is no run directory, it has no config.yaml")
    cfg = OmegaConf.load(run / "config.yaml")
    assert isinstance(cfg, DictConfig)
    # All weights come from the run's own checkpoint, wherever they started.
    cfg.model.pretrained, cfg.model.checkpoint = False, None
    best, last = run / "checkpoints" / "best.pt", run / "checkpoints" / "last.pt"
    path = best if best.exists() else last
    saved = checkpoint.read(path)

    task = build_task(cfg, world)
    trainer = build(cfg.trainer, "trainer")
    model, _ = sparse_model(cfg, task, build(cfg.permutation, "permutation"))
    model.to(world.device, trainer.dtype)
    # As in training, whose device may have been another.
    choices = dispatch.restore(saved["backends"], world.device)
    dispatch.reuse(model, choices or dispatch.forced(model, "torch", world.device))
    checkpoint.load_weights(model, saved["average"] or saved["model"], path)
    batches = validation_loader(
        task,
        batch_size=settings.batch_size or trainer.eval_batch_size or trainer.micro_batch_size(1),
        rank=world.rank,
        world_size=world.size,
        workers=trainer.workers,
    )
    metrics = evaluation.evaluate(model, task, batches, precision=trainer.precision, world=world)
    return path, metrics


if __name__ == "__main__":
    main()
