"""Moves: hard permutations whose features change places when topologies change, if that pays."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from padst_exp.errors import require
from padst_exp.permutations.exchange import Evidence, Exchange
from padst_exp.permutations.learners import PermutationLearner, Side
from padst_exp.permutations.pairs import disjoint_pairs
from padst_exp.permutations.permutation import Permutation
from padst_exp.soft import Soft


class Moves(PermutationLearner):
    """Swaps pairs of features at updates of the topology, and lets their values go along.

    There is no matrix and no soft phase: it begins as a fixed random permutation, and costs a dense
    gradient at every `every`-th update. A swap gives two features each other's slots. What they
    lose of their active entries costs h w^2; what they gain of inactive ones is worth g^2 / h. The
    unit h is the one in which the algorithm's own exchange is even: with f the share it drops,
    the f smallest weights against as many largest gradients.

    Estimates are cross-fitted. The samples of the step fall into four parts; products of the
    gradients of two parts, which are unbiased for g^2, pair the features (the largest gains first,
    disjoint), and those of the other two test the pairs: a swap is taken if its gain there is more
    than `significance` standard errors, as long as no more entries are lost in all than the
    algorithm would have dropped.

    Args:
        side: as in `PermutationLearner`.
        every: at every so many-th update of the topology.
        significance: standard errors.
        deadline: fraction of training after which nothing moves.
    """

    parts = 4
    spends_drops = True

    def __init__(self, *, side: Side, every: int, significance: float, deadline: float) -> None:
        super().__init__(side=side)
        require(every >= 1, "permutation.every", every, "at least 1 update")
        require(significance >= 0, "permutation.significance", significance, "at least 0")
        require(0 < deadline <= 1, "permutation.deadline", deadline, "a fraction in (0, 1]")
        self.every = every
        self.significance = significance
        self.deadline = deadline
        self.updates = 0
        self.movable: dict[str, Permutation] = {}

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        return Permutation(torch.randperm(size, generator=generator, device=generator.device))

    def start(self, choices: Mapping[str, Soft]) -> None:
        super().start(choices)
        self.updates = 0
        self.movable = {n: c for n, c in choices.items() if isinstance(c, Permutation)}

    def exchanges(self, step: int, total: int, *, rewiring: bool) -> Mapping[str, Permutation]:
        self.updates += rewiring
        due = rewiring and self.updates % self.every == 0 and step / total <= self.deadline
        return self.movable if due else {}

    @torch.no_grad()
    def exchange(self, permutation: Permutation, evidence: Evidence | None) -> Exchange | None:
        assert evidence is not None
        held, active = permutation.held(), evidence.active
        unit = even_unit(evidence)
        if unit is None:
            return None
        first, second, third, fourth = evidence.gradients
        worth = unit * evidence.values.square()
        table = active.to(worth.dtype)
        chosen, _ = swap_gains(table, worth, first * second / unit)
        tested, errors = swap_gains(
            table, worth, third * fourth / unit, noise(third, fourth) / unit**2
        )
        assert errors is not None
        significant = tested > self.significance * errors
        lost = table.sum(0) - table.T @ table  # [i, j]: entries of slot i that slot j has not
        cost = lost + lost.T
        slots = _swaps(chosen, significant, cost, evidence.budget)
        if slots is None:
            return None
        index = held[slots] if evidence.side == "in" else slots[held]
        return Exchange(index=index, carry=True)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.updates = state["updates"]


def even_unit(evidence: Evidence) -> float | None:
    """Return h: the f-th smallest weight and the f-th largest gradient, as h w^2 = g^2 / h.

    f is the budget of entries. None: nothing is to be lost, or no gradient stands out from noise.
    """
    values = evidence.values[evidence.active].abs()
    values = values[values > 0]
    first, second, *_ = evidence.gradients
    squares = (first * second)[~evidence.active]
    number = min(int(evidence.budget), len(values), len(squares))
    if number < 1:
        return None
    weight = float(values.kthvalue(number).values)
    square = float(squares.kthvalue(len(squares) - number + 1).values)
    return square**0.5 / weight if square > 0 else None


def noise(one: Tensor, other: Tensor) -> Tensor:
    """Return the variance `[R, d]` of the product of two unbiased estimates of one gradient.

    s^4 + 2 g^2 s^2, with s^2 the variance of an estimate, equal in each row.
    """
    variance = (one - other).square().mean(1, keepdim=True) / 2
    return variance.square() + 2 * (one * other).clamp_min(0) * variance


def swap_gains(
    active: Tensor, worth: Tensor, grown: Tensor, variance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return what swapping the features of two slots gains, `[d, d]`, and its standard error.

    Args:
        active: `[R, d]`, 1 where a slot is active, else 0.
        worth: `[R, d]`, of the entries that the feature of a slot has.
        grown: `[R, d]`, of those that it has not.
        variance: `[R, d]`, of the latter.
    """
    value = active.T @ torch.where(active > 0, worth, grown)  # [i, j]: feature of j in slot i
    stays = value.diagonal()
    gains = value + value.T - stays - stays[:, None]
    if variance is None:
        return gains, None
    spread = active.T @ variance.masked_fill(active > 0, 0)
    return gains, (spread + spread.T).sqrt()


def _swaps(gains: Tensor, allowed: Tensor, cost: Tensor, budget: float) -> Tensor | None:
    """Return which slot's feature each slot gets, `[d]`: disjoint swaps, the best first; or None.

    They are paired by `gains` alone, or whoever fails one test would try the next; then those that
    are not allowed drop out. All together cost no more than the budget.
    """
    slots = torch.arange(len(gains), device=gains.device)
    # Where nothing is lost the same rows read both, and what seems gained is rounding.
    for one, other in disjoint_pairs(gains.masked_fill(cost == 0, 0)):
        price = float(cost[one, other])
        if allowed[one, other] and price <= budget:
            slots[one], slots[other] = other, one
            budget -= price
    return None if bool((slots.diff() == 1).all()) else slots
