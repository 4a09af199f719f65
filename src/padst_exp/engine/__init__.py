"""Training: the loop, checkpoints, run directories, metrics, processes.

    world = start(device)
    directory = RunDirectory.create(...)          # on rank 0
    summary = run(model=model, task=task, ..., directory=directory, world=world)
"""

from padst_exp.engine.checkpoint import read as read_checkpoint
from padst_exp.engine.distributed import World, start
from padst_exp.engine.evaluation import evaluate
from padst_exp.engine.interruption import Interrupted
from padst_exp.engine.loggers import NoLogger, Wandb
from padst_exp.engine.loop import run
from padst_exp.engine.optimizers import SGD, AdamW, OptimizerBuilder
from padst_exp.engine.run_directory import TIME_FIELDS, RunDirectory, read_metrics
from padst_exp.engine.settings import Trainer

__all__ = [
    "SGD",
    "TIME_FIELDS",
    "AdamW",
    "Interrupted",
    "NoLogger",
    "OptimizerBuilder",
    "RunDirectory",
    "Trainer",
    "Wandb",
    "World",
    "evaluate",
    "read_checkpoint",
    "read_metrics",
    "run",
    "start",
]
