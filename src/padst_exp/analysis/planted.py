"""Planted regression: does a learner find a permutation that is really there?

The teacher is Y = S* P* X with a random sparse S* and a random permutation P*. The student knows
the structure and the density and learns topology, values and permutation together, by the engine of
every training. Wrong permutations put S* out of the structure's reach, so that the error tells them
apart in a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from padst_exp.data.task import Task
from padst_exp.dst import Algorithm
from padst_exp.engine.distributed import World
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.loggers import NoLogger
from padst_exp.engine.optimizers import OptimizerBuilder
from padst_exp.engine.placement import Placement
from padst_exp.engine.settings import Trainer
from padst_exp.engine.state import TrainingState
from padst_exp.engine.step import Stepper
from padst_exp.layers import sparse_layers
from padst_exp.permutations import PermutationLearner
from padst_exp.seeds import stream
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Structure, gather_entries, random_units, scatter_entries


@dataclass(frozen=True)
class Outcome:
    """How one student ended.

    Args:
        error: |S P - S* P*|^2 / |S* P*|^2 over the whole weight.
        hardened: why, and after which share of the training; None where nothing was soft.
    """

    error: float
    hardened: tuple[str, float] | None


class Planted(Task):
    """The outputs of a fixed teacher for normal inputs; endless, so never evaluated."""

    kind = "classification"
    monitor = ("error", "min")
    items_per_sample = 1

    def __init__(self, structure: Structure, *, size: int, density: float, seed: int) -> None:
        self.model_shape = {}
        self.train = self.validation = range(2**31)
        generator = stream(seed, "teacher")
        geometry = structure.geometry(size, size, density)
        units = random_units(geometry, structure.initial_counts(geometry, density), generator)
        entries = geometry.entries(units)
        values = gather_entries(torch.randn(size, size, generator=generator), entries)
        teacher = scatter_entries(values, entries, geometry.shape)
        self.teacher = teacher[:, torch.randperm(size, generator=generator)]
        self.generator = stream(seed, "inputs")

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `size` samples, for ever."""
        while True:
            x = torch.randn(size, self.teacher.shape[1], generator=self.generator)
            yield x, x @ self.teacher.T

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(logits, targets)

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        raise AssertionError("nothing is evaluated here")

    def summarize(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        raise AssertionError("nothing is evaluated here")


def learn_planted(
    structure: Structure,
    learner: PermutationLearner,
    *,
    algorithm: Algorithm,
    optimizer: OptimizerBuilder,
    trainer: Trainer,
    seed: int,
    noise: float | None = None,
    size: int = 96,
    density: float = 0.1,
) -> Outcome:
    """Train one student.

    Args:
        structure, learner, algorithm, optimizer, trainer, seed: as in any training.
        noise: None: the student starts fresh. Else it is cut from a trained dense weight, the
            teacher's plus so many of its standard deviations of noise.
        size: inputs, and outputs.
        density: of teacher and student.
    """
    task = Planted(structure, size=size, density=density, seed=seed)
    torch.manual_seed(seed)
    dense = nn.Linear(size, size, bias=False)
    if noise is not None:
        apart = noise * task.teacher.std() * torch.randn(size, size)
        dense.weight.data.copy_(task.teacher + apart)
    model = nn.Sequential(dense)
    report = sparsify(
        model, [Rule("0")], structure=structure, density=density, learner=learner,
        algorithm=algorithm, seed=seed, rescale=noise is None,
        topology="random" if noise is None else "magnitude",
    )  # fmt: skip
    experiment = Experiment(
        task=task, model=model, report=report, algorithm=algorithm, learner=learner,
        optimizer=optimizer, trainer=trainer, logger=NoLogger(), seed=seed, backend="torch",
    )  # fmt: skip
    state = TrainingState(experiment, placement=Placement(World()), saved=None, path=Path())
    hardened: list[tuple[str, float]] = []

    def record(kind: str, values: Mapping[str, Any]) -> None:
        if kind == "harden":
            hardened.append((values["reason"], values["step"] / experiment.total_steps))

    stepper = Stepper(experiment, state, record=record, say=lambda line: None)
    batches = task.batches(trainer.batch_size)
    for _ in range(experiment.total_steps):
        stepper.step(batches)
    (layer,) = sparse_layers(model).values()
    with torch.no_grad():
        error = (layer.weight - task.teacher).square().sum() / task.teacher.square().sum()
    return Outcome(float(error), hardened[-1] if hardened else None)


def mean_error(outcomes: list[Outcome]) -> float:
    """Mean over seeds."""
    return sum(outcome.error for outcome in outcomes) / len(outcomes)
