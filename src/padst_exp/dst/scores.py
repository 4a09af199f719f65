"""Scores that decide which units leave and which come. A score is a class and a line of YAML."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from padst_exp.dst.topology import Signals, Topology


class DropScore(abc.ABC):
    """Scores active units; the lowest leave."""

    @abc.abstractmethod
    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        """Fp `[N]`, one score for each active unit."""


class GrowScore(abc.ABC):
    """Scores all units, seen after the drop; the highest candidates come."""

    needs_gradient = False

    @abc.abstractmethod
    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        """Fp `[P, Q]`, one score for each unit; `topology` holds the survivors of the drop."""


class Magnitude(DropScore):
    """Root mean square of a unit's weights (SET, Mocanu et al. 2018; RigL, Evci et al. 2020)."""

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        return signals.weight


class Uniform(GrowScore):
    """Uniformly random growth (SET)."""

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        shape = (topology.num_pools, topology.pool_size)
        return torch.rand(shape, generator=signals.generator).to(topology.active.device)


class Gradient(GrowScore):
    """Root mean square of the dense gradient over a unit (RigL)."""

    needs_gradient = True

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        assert signals.gradient is not None
        return signals.gradient
