"""Everything a run is made of, built once and handed down whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from padst_exp.data.sampler import train_loader
from padst_exp.data.task import Task
from padst_exp.dispatch import Backend
from padst_exp.dst import Algorithm, DropGrow
from padst_exp.engine.distributed import World
from padst_exp.engine.loggers import NoLogger
from padst_exp.engine.optimizers import SGD, AdamW, OptimizerBuilder
from padst_exp.engine.settings import Trainer
from padst_exp.errors import require
from padst_exp.layers import sparse_weights
from padst_exp.permutations import PermutationLearner
from padst_exp.soft import Learner
from padst_exp.sparsify import Report


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is to be trained, on what, and how.

    Args:
        task: data, loss and metrics.
        model: sparsified, with its permutations; the same on every rank.
        report: of the sparsification.
        algorithm: changes the topologies.
        learner: trains the permutations.
        optimizer: builds the optimizer of all else.
        trainer: how long and in what portions.
        logger: gets the metrics too.
        seed: of batches, augmentation, dropout and growth.
        backend: of the sparse layers; "auto" measures.
    """

    task: Task
    model: nn.Module
    report: Report
    algorithm: Algorithm
    learner: PermutationLearner
    optimizer: OptimizerBuilder
    trainer: Trainer
    logger: NoLogger
    seed: int
    backend: Backend | Literal["auto"]

    def __post_init__(self) -> None:
        warmup = self.optimizer.regrowth_warmup if isinstance(self.optimizer, AdamW) else 0
        require(
            warmup == 0 or self.algorithm.moments == "age",
            "optimizer.regrowth_warmup",
            warmup,
            "0 with dst.moments=zero, which keeps no births",
        )
        precision = self.trainer.precision
        require(
            self.backend != "semi_structured" or precision == "bfloat16",
            "trainer.precision",
            precision,
            "bfloat16 with backend=semi_structured",
        )
        drops = type(self.algorithm).drop_fraction is not Algorithm.drop_fraction
        require(
            drops or not self.learner.spends_drops,
            "dst",
            type(self.algorithm).__name__,
            "one that drops and grows, such as rigl, where a permutation moves within drops",
        )

        if self.trainer.parallel == "fsdp":
            self._require_parts()

    def _require_parts(self) -> None:
        """Refuse what needs more of a parameter at a time than one rank has."""
        with_fsdp = "with trainer.parallel=fsdp"
        storages = {weight.storage for weight in sparse_weights(self.model).values()}
        require("masked" not in storages, "storage", "masked", f"packed {with_fsdp}")
        kind = type(self.optimizer)
        require(kind in (AdamW, SGD), "optimizer", kind.__name__, f"adamw or sgd {with_fsdp}")
        name = type(self.algorithm).__name__
        if isinstance(self.algorithm, DropGrow):
            name += f" with counts {type(self.algorithm.counts).__name__}"
        wanted = f"one that keeps the number of entries {with_fsdp}, such as rigl"
        require(not self.algorithm.resizes, "dst", name, wanted)
        moves = self.learner.moves_masks
        wanted = f"one that keeps weights sparse {with_fsdp}, such as doubly_stochastic"
        require(not moves, "permutation", type(self.learner).__name__, wanted)
        require(not self.trainer.compile, "trainer.compile", True, f"false {with_fsdp}")

    @property
    def learners(self) -> list[Learner]:
        """Those of all soft choices: of permutations, and of selections if there are any."""
        selections = self.algorithm.selection_learner
        return [self.learner] if selections is None else [self.learner, selections]

    def require_batches(self, world: World) -> None:
        """Raise a `UserError` where training or evaluating would find that batches do not fit."""
        trainer = self.trainer
        train_loader(
            self.task,
            batch_size=trainer.batch_size,
            micro_batches=trainer.micro_batches,
            start_step=0,
            total_steps=self.total_steps,
            seed=self.seed,
            rank=world.rank,
            world_size=world.size,
            workers=trainer.workers,
        )
        self.task.require_micro_batch(trainer.micro_batch_size(world.size))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.trainer.total_steps(self.task.samples)
