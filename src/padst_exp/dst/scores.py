"""Scores that decide which units leave and which come. A score is a class and a line of YAML."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from padst_exp.dst.topology import Signal, Signals, Topology
from padst_exp.errors import require
from padst_exp.pools import Trait


class Score(abc.ABC):
    """A number for every unit.

    Attributes:
        needs: which signals it reads besides magnitudes; nothing else is computed.
        requires: what units and pools must be for it to make sense, as in `Algorithm`.
    """

    needs: frozenset[Signal] = frozenset()
    requires: frozenset[Trait] = frozenset()

    @abc.abstractmethod
    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        """A `DropScore` returns `[N]`, a `GrowScore` `[P, Q]`, floating point."""


class DropScore(Score):
    """Scores the active units, `[N]`; the lowest leave."""


class GrowScore(Score):
    """Scores all units, `[P, Q]`, seen after the drop; the highest candidates come.

    `topology` holds the survivors of the drop; `signals` are those of before.
    """


class Magnitude(DropScore):
    """Root mean square of a unit's weights (SET, Mocanu et al. 2018; RigL, Evci et al. 2020)."""

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        return signals.magnitude


class MagnitudeAndGradient(DropScore):
    """|w| + gradient * |dL/dw|, each as the root mean square of a unit (MEST, Yuan et al. 2021).

    Args:
        gradient: lambda; 0 in the scripts that MEST publishes, which makes it `Magnitude`.
    """

    needs = frozenset({"weight_gradient"})

    def __init__(self, *, gradient: float) -> None:
        require(gradient >= 0, "dst.drop.gradient", gradient, "at least 0")
        self.gradient = gradient

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        assert signals.weight_gradient is not None
        return signals.magnitude + self.gradient * signals.weight_gradient


class Uniform(GrowScore):
    """Uniformly random growth (SET)."""

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        shape = (topology.num_pools, topology.pool_size)
        return torch.rand(shape, generator=signals.generator).to(topology.active.device)


class Gradient(GrowScore):
    """Root mean square of the dense gradient over a unit (RigL)."""

    needs = frozenset({"dense_gradient"})

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        assert signals.dense_gradient is not None
        return signals.dense_gradient
