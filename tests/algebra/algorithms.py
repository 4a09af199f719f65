"""Small algorithms that use what the algebra offers beyond "as many in, as many out"."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from padst_exp.dst import (
    Algorithm,
    Change,
    DropScore,
    GrowScore,
    Selection,
    Signals,
    Topology,
)
from padst_exp.pools import best_of_each
from padst_exp.soft import Learner, Readiness, Soft


class EveryFourth(Algorithm):
    """Changes topologies every fourth step, until three quarters of the training."""

    def is_due(self, step: int, total: int) -> bool:
        return step % 4 == 0 and step <= 0.75 * total


class Roaming(EveryFourth):
    """A third of the units move to the largest gradients of the layer, whatever their pool.

    The number of units stays; how many each pool has does not.
    """

    needs = frozenset({"dense_gradient"})

    def can_change(self, topology: Topology) -> bool:
        return len(topology.active) < int(topology.candidates.sum())

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        assert signals.dense_gradient is not None
        number = max(1, len(topology.active) // 3)
        kept = signals.magnitude.sort(descending=True, stable=True).indices
        kept = topology.active[kept[: len(topology.active) - number]]
        scores = signals.dense_gradient.masked_fill(~topology.exists(), -torch.inf).flatten()
        scores[kept] = -torch.inf
        come = best_of_each(scores[None], torch.tensor([number]))[0].nonzero().squeeze(1)
        return Change(torch.cat([kept, come]).sort().values), carry


class Dwindling(EveryFourth):
    """Starts dense and loses its smallest units, down to the density asked."""

    def initial_density(self, density: float) -> float:
        return 1.0

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        counts, target = topology.counts(), topology.target
        left = max(0.0, 1 - step / (0.7 * total))
        counts = target + ((counts - target).clamp(min=0) * left).ceil().long()
        counts = counts.minimum(topology.counts())
        scores = signals.magnitude.new_full(topology.exists().shape, -torch.inf)
        scores.view(-1)[topology.active] = signals.magnitude
        return Change(best_of_each(scores, counts).flatten().nonzero().squeeze(1)), carry


class Reordering(EveryFourth):
    """Exchanges some rows of the natural order; some units are drawn anew."""

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        order = torch.arange(topology.shape[0])
        some = torch.randperm(len(order), generator=signals.generator)[: len(order) // 4]
        order[some] = some.sort().values
        scores = torch.rand(topology.exists().shape, generator=signals.generator)
        scores.view(-1)[topology.active[1:]] = 2.0
        scores = scores.masked_fill(~topology.exists(), -torch.inf)
        active = best_of_each(scores, topology.counts()).flatten().nonzero().squeeze(1)
        return Change(active, row_order=order), carry


class SoftTopK(Algorithm):
    """All candidates live and are weighed, until the best of each pool stay (DynaDiag)."""

    def __init__(self) -> None:
        self.selection_learner = Tempered()

    def initial_density(self, density: float) -> float:
        return 1.0

    def selection(self, topology: Topology, generator: torch.Generator) -> Selection:
        return Selection(topology, 0.1 * torch.randn(len(topology.active), generator=generator))

    def is_due(self, step: int, total: int) -> bool:
        return False

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        raise AssertionError("topologies change by selection only")


class Tempered(Learner):
    """Trains selections while their temperature falls, until two thirds of the training."""

    kind = Selection

    def __init__(self) -> None:
        super().__init__(interval=3)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.05)

    def regularize(self, progress: float) -> None:
        for choice in self.choices.values():
            assert isinstance(choice, Selection)
            choice.temperature.fill_(0.001 ** min(1.0, progress / 0.6))

    def ready(self, choice: Soft, progress: float) -> Readiness:
        return "deadline" if progress > 0.66 else None


class WeightAndGradient(DropScore):
    """|w| + lambda |g| (MEST, Yuan et al. 2021)."""

    needs = frozenset({"weight_gradient"})

    def __init__(self, *, weight: float) -> None:
        self.weight = weight

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        assert signals.weight_gradient is not None
        return signals.magnitude + self.weight * signals.weight_gradient


class Seniority(DropScore):
    """The oldest units leave."""

    needs = frozenset({"age"})

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        assert signals.age is not None
        return -signals.age.double()


class NearDiagonal(GrowScore):
    """Units come where rows and columns have alike numbers."""

    needs = frozenset({"coordinates"})

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        assert signals.coordinates is not None
        rows, columns = signals.coordinates.T
        distance = (rows / topology.shape[0] - columns / topology.shape[1]).abs()
        return -distance.view(topology.num_pools, topology.pool_size)
