"""How long and in what portions to train: the target of conf/trainer/*.yaml."""

from dataclasses import dataclass
from typing import Literal

import torch

from padst_exp.errors import UserError

Precision = Literal["float32", "bfloat16", "float64"]


def require(valid: bool, key: str, value: object, wanted: str) -> None:
    """Raise a one-line `UserError` naming `key` and `value` unless `valid`."""
    if not valid:
        raise UserError(f"{key}: expected {wanted}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Settings of the training loop.

    Args:
        steps: optimizer steps of the whole training; either this or `epochs`.
        epochs: passes over the training set; may be a fraction.
        batch_size: samples per optimizer step, over all processes and micro-batches.
        micro_batches: parts in which each process computes its share of a batch, to save memory.
        eval_batch_size: samples per process in an evaluation; None: as many as one micro-batch.
        eval_interval: steps between evaluations; None: only at the end, where there always is one.
        checkpoint_interval: steps between checkpoints; None: at the end, at each new best
            evaluation and when interrupted, where there always is one.
        log_interval: steps between rows of training metrics (the only regular device sync).
        precision: "float32"; "bfloat16": float32 weights under autocast; "float64": everything.
        clip_norm: maximal norm of the gradient of all but soft permutations; None: no clipping.
        ema_decay: decay of an exponential moving average of the weights, which is then what gets
            evaluated next to the model; None: no average.
        compile: `torch.compile` the repeated blocks of the model.
        workers: processes that load data, per training process; 0: none but itself.
        keep_last: how many of the latest checkpoints to keep, `best.pt` aside.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 128
    micro_batches: int = 1
    eval_batch_size: int | None = None
    eval_interval: int | None = None
    checkpoint_interval: int | None = None
    log_interval: int = 10
    precision: Precision = "float32"
    clip_norm: float | None = None
    ema_decay: float | None = None
    compile: bool = False
    workers: int = 0
    keep_last: int = 1

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            both = "both" if self.steps is not None else "neither"
            raise UserError(f"trainer.steps: expected either this or trainer.epochs, got {both}")
        self._at_least("steps", self.steps, 1)
        require(self.epochs is None or self.epochs > 0, "trainer.epochs", self.epochs, "positive")
        for key in (
            "batch_size",
            "micro_batches",
            "eval_batch_size",
            "eval_interval",
            "checkpoint_interval",
            "log_interval",
            "keep_last",
        ):
            self._at_least(key, getattr(self, key), 1)
        self._at_least("workers", self.workers, 0)
        require(
            self.precision in ("float32", "bfloat16", "float64"),
            "trainer.precision",
            self.precision,
            "float32, bfloat16 or float64",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            "trainer.clip_norm",
            self.clip_norm,
            "positive, or null for no clipping",
        )
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "trainer.ema_decay",
            self.ema_decay,
            "between 0 and 1, or null for no average",
        )

    @staticmethod
    def _at_least(key: str, value: int | None, least: int) -> None:
        require(value is None or value >= least, f"trainer.{key}", value, f"at least {least}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and inputs."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def micro_batch_size(self, world_size: int) -> int:
        """Samples in one forward pass of one process."""
        parts = self.micro_batches * world_size
        require(
            self.batch_size % parts == 0,
            "trainer.batch_size",
            self.batch_size,
            f"a multiple of trainer.micro_batches={self.micro_batches} times {world_size} "
            "processes",
        )
        return self.batch_size // parts

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of the training on a set of `samples` samples, ragged ends dropped."""
        require(
            self.batch_size <= samples,
            "trainer.batch_size",
            self.batch_size,
            f"at most {samples}, the size of the training set",
        )
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * (samples // self.batch_size)))
