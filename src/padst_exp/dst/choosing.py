"""Algorithms under which all units of a weight live at first, and a selection chooses once."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from padst_exp.dst.algorithm import Algorithm
from padst_exp.dst.gates import GateLearner, MagnitudeGate
from padst_exp.dst.selection import Gate
from padst_exp.dst.topology import Change, Signals, Topology
from padst_exp.errors import require


class Choosing(Algorithm):
    """All units of a weight live at first; those that its gate chooses stay. Then it is fixed.

    Until then a weight is dense, and costs as much.
    """

    def initial_density(self, density: float) -> float:
        return 1.0

    def selection(self, topology: Topology, generator: torch.Generator) -> Gate | None:
        return self.gate(topology) if self.can_change(topology) else None

    @abc.abstractmethod
    def gate(self, topology: Topology) -> Gate:
        """What chooses among the units of a fresh `topology`."""

    def can_change(self, topology: Topology) -> bool:
        # Whether or not its gate has chosen already.
        return int(topology.target.sum()) < int(topology.candidates.sum())

    def is_due(self, step: int, total: int) -> bool:
        return False

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        return Change(topology.active), carry


class SRSTE(Choosing):
    """Dense values, of which the largest of each pool count (SR-STE, Zhou et al. 2021).

    Gradients pass straight through to the others too, which also decay. The paper's pools are
    the chunks of N:M; here they are those of any structure.

    Args:
        decay: lambda of the gradient lambda * w that is added to what does not count.
        freeze: share of training at which the others go.
        interval: optimizer steps between two looks whether it is time to.
    """

    def __init__(self, *, decay: float, freeze: float, interval: int) -> None:
        require(decay >= 0, "dst.decay", decay, "at least 0")
        self.decay = decay
        self.selection_learner = GateLearner(freeze=freeze, interval=interval)

    def gate(self, topology: Topology) -> Gate:
        return MagnitudeGate(topology, topology.counts(), kept_decay=0.0, other_decay=self.decay)


class TopKAST(Choosing):
    """The largest units compute, somewhat more of them learn (Top-KAST, Jayakumar et al. 2020).

    Which are the largest is looked up at every step; the paper does so every hundredth.

    Args:
        backward: density of what learns.
        decay: of the gradient decay * w that is added to what computes, and decay / density * w to
            what learns besides.
        freeze: share of training at which all but the largest go.
        interval: optimizer steps between two looks whether it is time to.
    """

    def __init__(self, *, backward: float, decay: float, freeze: float, interval: int) -> None:
        require(0 < backward <= 1, "dst.backward", backward, "a density in (0, 1]")
        require(decay >= 0, "dst.decay", decay, "at least 0")
        self.backward = backward
        self.decay = decay
        self.selection_learner = GateLearner(freeze=freeze, interval=interval)

    def gate(self, topology: Topology) -> Gate:
        learning: Tensor = (topology.candidates * self.backward).round().to(torch.int64)
        density = float(topology.target.sum() / topology.candidates.sum())
        return MagnitudeGate(
            topology,
            learning.maximum(topology.target),
            kept_decay=self.decay,
            other_decay=self.decay / density,
        )
