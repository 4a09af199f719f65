"""Where metrics go besides `metrics.jsonl`: targets of conf/logger/*.yaml."""

from padst_exp.engine.loggers.base import NoLogger, Tracker, flat_values, numbers
from padst_exp.engine.loggers.mlflow import Mlflow
from padst_exp.engine.loggers.tensorboard import TensorBoard
from padst_exp.engine.loggers.trackio import Trackio
from padst_exp.engine.loggers.wandb import Wandb

__all__ = [
    "Mlflow",
    "NoLogger",
    "TensorBoard",
    "Tracker",
    "Trackio",
    "Wandb",
    "flat_values",
    "numbers",
]
