"""Scores that decide which units leave and which come. A score is a class and a line of YAML."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from padst_exp.dst.topology import Signal, Signals, Topology


class Score(abc.ABC):
    """A number for every unit.

    Attributes:
        needs: which signals it reads besides magnitudes; nothing else is computed.
    """

    needs: frozenset[Signal] = frozenset()

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
