"""How many units of each pool are active as training goes on: targets of a YAML's `counts`."""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from padst_exp.dst.topology import Topology
from padst_exp.errors import require


class Counts(abc.ABC):
    """A schedule of the number of active units, between the start and `Topology.target`."""

    def initial_density(self, density: float) -> float:
        """The density a weight starts with that ends with `density`."""
        return density

    @abc.abstractmethod
    def __call__(self, topology: Topology, progress: float) -> Tensor:
        """Active units of each pool, int64 `[P]`, after the update at `progress` in 0 .. 1."""


class Constant(Counts):
    """Every pool keeps as many units as it has."""

    def __init__(self) -> None:
        """Takes nothing."""

    def __call__(self, topology: Topology, progress: float) -> Tensor:
        return topology.counts()


class Shrinking(Counts):
    """From `start` down to the density asked; what sets subclasses apart is `remaining`.

    Args:
        start: density at the beginning; the density asked where that is higher.
        begin: share of training at which shrinking begins.
        end: share of training at which it ends.
    """

    def __init__(self, *, start: float, begin: float, end: float) -> None:
        require(0 < start <= 1, "dst.counts.start", start, "a density in (0, 1]")
        require(0 <= begin < 1, "dst.counts.begin", begin, "a share of training in [0, 1)")
        require(begin < end <= 1, "dst.counts.end", end, f"a share in ({begin}, 1]")
        self.start = start
        self.begin = begin
        self.end = end

    @abc.abstractmethod
    def remaining(self, share: float) -> float:
        """How much of the way down is left after `share` of it, from 1 at 0 to 0 at 1."""

    def initial_density(self, density: float) -> float:
        return max(self.start, density)

    def __call__(self, topology: Topology, progress: float) -> Tensor:
        share = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        left, target = self.remaining(share), topology.target
        first = (topology.candidates * self.start).round().to(torch.int64).maximum(target)
        between = target + ((first - target) * left).round().to(torch.int64)
        # Never back up, whatever rounding does.
        return between.minimum(topology.counts()).maximum(target)


class Cubic(Shrinking):
    """(1 - share)^3 (GMP, Zhu & Gupta 2018, equation 1; GraNet, Liu et al. 2021)."""

    def remaining(self, share: float) -> float:
        return (1 - share) ** 3


class Sigmoid(Shrinking):
    """A sigmoid from start to end (CHTss, Zhang et al. 2025).

    Args:
        start, begin, end: as in `Shrinking`.
        steepness: of the sigmoid over the whole way.
    """

    def __init__(self, *, start: float, begin: float, end: float, steepness: float) -> None:
        super().__init__(start=start, begin=begin, end=end)
        require(steepness > 0, "dst.counts.steepness", steepness, "positive")
        self.steepness = steepness

    def remaining(self, share: float) -> float:
        def raw(at: float) -> float:
            return 1 / (1 + math.exp(self.steepness * (at - 0.5)))

        return (raw(share) - raw(1.0)) / (raw(0.0) - raw(1.0))
