"""Planted regression: does a learner find a permutation that is really there?

The teacher is Y = S* P* X with a random sparse S* and a random permutation P*. The student knows
the structure and the density and learns topology (RigL), values and permutation together. Wrong
permutations put S* out of the structure's reach, so that the error tells them apart in a second.
"""

import math
from dataclasses import dataclass

import torch

from padst_exp.dst import DropGrow, Gradient, Magnitude
from padst_exp.layers import SparseLinear, SparseWeight
from padst_exp.permutations import Learner
from padst_exp.structures import Layout, Structure


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
    learner: Learner,
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
    layout = structure.layout(size, size, density)
    teacher = _weight(layout, 1.0, generator).dense()[:, torch.randperm(size, generator=generator)]
    weight = _weight(layout, 0.5 / math.sqrt(density * size), generator)
    permutation = learner.create(size, generator)
    student = SparseLinear([weight], None, permutation, [None])
    soft = [] if permutation is None or not permutation.soft else [permutation]

    optimizer = torch.optim.Adam([weight.values], lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    soft_optimizer = learner.optimizer([p.logits for p in soft]) if soft else None
    rigl = DropGrow(
        drop=Magnitude(),
        grow=Gradient(),
        fraction=0.3,
        interval=interval,
        stop=0.75,
        moments="zero",
    )
    hardened = None
    for step in range(1, steps + 1):
        weight.collect_dense_gradient = rigl.is_due(step, steps)
        x = torch.randn(batch, size, generator=generator)
        loss = (student(x) - x @ teacher.T).square().mean()
        student.zero_grad()
        loss.backward()
        learner.regularize(soft, (step - 1) / steps)
        optimizer.step()
        schedule.step()
        if soft_optimizer is not None and soft:
            soft_optimizer.step()
            learner.project(soft)
        if weight.collect_dense_gradient:
            relayout = weight.rewire(rigl, step=step, total=steps, generator=generator)
            for name in ("exp_avg", "exp_avg_sq"):
                moments = optimizer.state[weight.values]
                moments[name] = weight.move(moments[name], relayout)
            weight.relayout_(relayout)
            weight.dense_gradient = None
        if soft and step % interval == 0:
            why = learner.ready(soft[0], step / steps)
            if why is not None:
                soft.pop().harden()
                hardened = (why, step / steps)
    with torch.no_grad():
        found = student(torch.eye(size)).T
    return Outcome(float((found - teacher).square().sum() / teacher.square().sum()), hardened)


def _weight(layout: Layout, scale: float, generator: torch.Generator) -> SparseWeight:
    dense = scale * torch.randn(layout.shape, generator=generator)
    return SparseWeight(layout, layout.random_units(generator), dense, "packed")


def mean_error(outcomes: list[Outcome]) -> float:
    """Mean over seeds."""
    return sum(outcome.error for outcome in outcomes) / len(outcomes)
