"""How many units of each pool are active as training goes on: targets of a YAML's `counts`."""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from padst_exp.dst.topology import Topology
from padst_exp.errors import require


class Counts(abc.ABC):
    """A schedule of the number of active units, between the start and `Topology.target`.

    Attributes:
        end: share of training from which on pools have their target; 0 where they always have.
    """

    end: float = 0.0

    def initial_density(self, density: float) -> float:
        """The density a weight starts with that ends with `density`."""
        return density

    @abc.abstractmethod
    def __call__(self, topology: Topology, progress: float) -> Tensor:
        """Active units of each pool, int64 `[P]`, after the update at `progress` in 0 .. 1."""

    def kept(self, topology: Topology, progress: float) -> Tensor:
        """To how many each pool is pruned before anything is replaced, int64 `[P]`."""
        return self(topology, progress).minimum(topology.counts())


class Constant(Counts):
    """Every pool keeps as many units as it has."""

    def __init__(self) -> None:
        """Takes nothing."""

    def __call__(self, topology: Topology, progress: float) -> Tensor:
        return topology.counts()

    def kept(self, topology: Topology, progress: float) -> Tensor:
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
        require(begin < end <= 1, "dst.counts.end", end, f"a share of training in ({begin}, 1]")
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
        wanted = "from 0.001 (a straight line) to 1000 (a step)"
        require(1e-3 <= steepness <= 1e3, "dst.counts.steepness", steepness, wanted)
        self.steepness = steepness

    def remaining(self, share: float) -> float:
        def raw(at: float) -> float:
            return 1 / (1 + math.exp(self.steepness * (at - 0.5)))

        return (raw(share) - raw(1.0)) / (raw(0.0) - raw(1.0))


class Elastic(Counts):
    """Beyond the target for a while: an update prunes to it, then grows more than it may keep.

    The soft memory bound of MEST (Yuan et al. 2021): what is grown is trained until the next
    update, where it competes with the rest.

    Args:
        extra: share of the target by which pools exceed it at first; falls along a cosine.
        end: share of training at which nothing is left of it.
    """

    def __init__(self, *, extra: float, end: float) -> None:
        require(extra > 0, "dst.counts.extra", extra, "a positive share of the active units")
        require(0 < end <= 1, "dst.counts.end", end, "a share of training in (0, 1]")
        self.extra = extra
        self.end = end

    def __call__(self, topology: Topology, progress: float) -> Tensor:
        share = self.extra / 2 * (1 + math.cos(math.pi * min(progress / self.end, 1.0)))
        # Rounded sums, not rounded pools: small ones would never exceed their target.
        sums = (topology.target.cumsum(0) * share).floor().to(torch.int64)
        extra = sums.diff(prepend=sums.new_zeros(1))
        return (topology.target + extra).minimum(topology.candidates)

    def kept(self, topology: Topology, progress: float) -> Tensor:
        return topology.target.minimum(topology.counts())
