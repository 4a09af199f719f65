"""Planted regression: does a learner find a permutation that is really there?

The teacher is Y = S* P* X with a random sparse S* and a random permutation P*. The student knows
the structure and the density and learns topology (RigL), values and permutation together. Wrong
permutations put S* out of the structure's reach, so that the error tells them apart in a second.
"""

import math
from dataclasses import dataclass

import torch

from dst_cases import rigl
from padst_exp.layers import SparseLinear, SparseWeight
from padst_exp.permutations import PermutationLearner
from padst_exp.structures import Geometry, Structure, random_units


@dataclass(frozen=True)
class Outcome:
    """How one student ended.

    error: |S P - S* P*|^2 / |S* P*|^2 over the whole weight.
    hardened: (why, progress), or None where nothing was soft.
    """

    error: float
    hardened: tuple[str, float] | None


def learn_planted(
    structure: Structure,
    learner: PermutationLearner,
    *,
    seed: int,
    size: int = 64,
    density: float = 0.1,
    steps: int = 400,
    interval: int = 10,
    batch: int = 256,
    lr: float = 0.1,
) -> Outcome:
    """Train one student; the permutation is on the input side."""
    generator = torch.Generator().manual_seed(seed)
    geometry = structure.geometry(size, size, density)
    counts = structure.initial_counts(geometry, density)
    teacher = _weight(geometry, counts, 1.0, generator).matrix().detach()
    teacher = teacher[:, torch.randperm(size, generator=generator)]
    weight = _weight(geometry, counts, 0.5 / math.sqrt(density * size), generator)
    permutation = learner.create(size, generator)
    student = SparseLinear([weight], None, permutation, [None])
    soft = permutation is not None and permutation.soft
    learner.start({"p": permutation} if permutation is not None and soft else {})

    optimizer = torch.optim.Adam([weight.values], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    algorithm = rigl(fraction=0.3, interval=interval, stop=0.75)
    hardened = None
    for step in range(1, steps + 1):
        weight.collect_dense_gradient = algorithm.is_due(step, steps)
        x = torch.randn(batch, size, generator=generator)
        loss = (student(x) - x @ teacher.T).square().mean()
        student.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        learner.step((step - 1) / steps)
        if weight.collect_dense_gradient:
            change = weight.decide(algorithm, step=step, total=steps, generator=generator)
            move = weight.adopt(change)
            moments = optimizer.state[weight.values]
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = move(moments[name])
            weight.dense_gradient = None
        for name, choice in list(learner.choices.items()):
            why = learner.ready(choice, step / steps) if step % interval == 0 else None
            if why is not None:
                logits = choice.logits
                assert logits is not None
                choice.harden()
                learner.release(name, logits)
                hardened = (why, step / steps)
    with torch.no_grad():
        found = student(torch.eye(size)).T
    return Outcome(float((found - teacher).square().sum() / teacher.square().sum()), hardened)


def _weight(
    geometry: Geometry, counts: torch.Tensor, scale: float, generator: torch.Generator
) -> SparseWeight:
    dense = scale * torch.randn(geometry.shape, generator=generator)
    return SparseWeight(geometry, random_units(geometry, counts, generator), dense, "packed")


def mean_error(outcomes: list[Outcome]) -> float:
    """Mean over seeds."""
    return sum(outcome.error for outcome in outcomes) / len(outcomes)
