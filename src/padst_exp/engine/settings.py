"""How long and in what portions to train: the target of conf/trainer/*.yaml."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from padst_exp.errors import require

# More would never end, or never begin.
MOST_STEPS, MOST_WORKERS = 10**15, 1024
# Each takes megabytes of memory, and of disk.
MOST_PROFILED = 1000

Precision = Literal["float32", "bfloat16", "float64"]
Parallel = Literal["ddp", "fsdp"]


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
        parallel: "ddp": every process has the whole model; "fsdp": of its parameters, gradients
            and moments it has a part.
        compile: `torch.compile` the repeated blocks of the model.
        workers: processes that load data, per training process; 0: none but itself.
        keep_last: how many of the latest checkpoints to keep, `best.pt` aside.
        profile: steps to profile after a warm-up, into the folder `profile` of the run; None: none.
        peak_flops: FLOP/s that one device could reach in this precision, which MFU is a share of;
            None: that of a known GPU in bfloat16, else unknown.
    """

    steps: int | None
    epochs: float | None
    batch_size: int
    micro_batches: int
    eval_batch_size: int | None
    eval_interval: int | None
    checkpoint_interval: int | None
    log_interval: int
    precision: Precision
    clip_norm: float | None
    ema_decay: float | None
    parallel: Parallel
    compile: bool
    workers: int
    keep_last: int
    profile: int | None
    peak_flops: float | None

    def __post_init__(self) -> None:
        one = (self.steps is None) != (self.epochs is None)
        found = "neither" if self.steps is None else "both"
        require(one, "trainer.steps", found, "either this or trainer.epochs")
        for key in (
            "steps",
            "batch_size",
            "micro_batches",
            "eval_batch_size",
            "eval_interval",
            "checkpoint_interval",
            "log_interval",
            "keep_last",
        ):
            self._require(key, lambda value: value >= 1, "at least 1")
        wanted = f"from 0 to {MOST_WORKERS}"
        self._require("workers", lambda value: 0 <= value <= MOST_WORKERS, wanted)
        wanted = f"from 1 to {MOST_PROFILED}, or null for none"
        self._require("profile", lambda value: 1 <= value <= MOST_PROFILED, wanted)
        self._require("epochs", lambda value: 0 < value < math.inf, "a positive number")
        wanted = "positive, or null for no clipping"
        self._require("clip_norm", lambda value: 0 < value < math.inf, wanted)
        wanted = "FLOP/s of one device, or null where unknown"
        self._require("peak_flops", lambda value: 0 < value < math.inf, wanted)
        wanted = "between 0 and 1, or null for no average"
        self._require("ema_decay", lambda value: 0 < value < 1, wanted)

    def _require(self, key: str, valid: Callable[[float], bool], wanted: str) -> None:
        value = getattr(self, key)
        require(value is None or valid(value), f"trainer.{key}", value, wanted)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and inputs."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def micro_batch_size(self, world_size: int) -> int:
        """Samples in one forward pass of one process.

        Training needs batches that divide evenly, and `data.sampler` refuses others.
        """
        return max(1, self.batch_size // (self.micro_batches * world_size))

    def total_steps(self, samples: int | None) -> int:
        """Optimizer steps of the training on a set of `samples` samples, ragged ends dropped.

        Args:
            samples: None of a stream.

        Raises:
            UserError: the set is smaller than a batch, or its size is unknown and asked for.
        """
        if samples is None:
            wanted = "null, and trainer.steps=... for a stream, whose end is not known"
            require(self.steps is not None, "trainer.epochs", self.epochs, wanted)
            samples = sys.maxsize
        fits = self.batch_size <= samples
        wanted = f"at most {samples}, the size of the training set"
        require(fits, "trainer.batch_size", self.batch_size, wanted)
        if self.steps is not None:
            key, value, steps = "steps", float(self.steps), self.steps
        else:
            assert self.epochs is not None
            per_epoch = samples // self.batch_size
            key, value, steps = "epochs", self.epochs, max(1, round(self.epochs * per_epoch))
        wanted = f"at most {MOST_STEPS:.0e} optimizer steps"
        require(steps <= MOST_STEPS, f"trainer.{key}", f"{value:g}", wanted)
        return steps


@dataclass(frozen=True, kw_only=True)
class Longer(Trainer):
    """The same for more steps: what a method without overhead does with the cost of one that has.

    Args:
        times: steps over those that `steps` or `epochs` say.
    """

    times: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("times", lambda value: 0 < value <= MOST_STEPS, "a positive number")

    def total_steps(self, samples: int | None) -> int:
        return max(1, round(self.times * super().total_steps(samples)))
