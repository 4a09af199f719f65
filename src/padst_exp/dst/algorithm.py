"""Dynamic sparse training algorithms. They know tables, never structures, and move nothing."""

from __future__ import annotations

import abc
import math
from typing import Literal

import torch

from padst_exp.dst.counts import Constant, Counts
from padst_exp.dst.scores import DropScore, GrowScore
from padst_exp.dst.selection import Gate
from padst_exp.dst.topology import Change, Signal, Signals, Topology
from padst_exp.errors import require
from padst_exp.pools import Trait, best_of_each
from padst_exp.soft import Learner


class Algorithm(abc.ABC):
    """Decides when and how topologies change. By itself it never changes one.

    Attributes:
        needs: which signals `decide` reads besides magnitudes.
        requires: what the units and pools of a structure must be for it to make sense.
        moments: `"age"`: bias corrections of a grown entry count from its birth; `"zero"`: from
            the start of training, as in the papers' code (its first steps are then up to 3.2
            times the learning rate at beta2 = 0.999).
        silences_rows: whether a row without active units is silent altogether, its bias too.
        resizes: whether a change may alter the number of active units of a weight.
        selection_learner: trains the `selection` of each weight; None where topologies are hard
            from the start.
    """

    needs: frozenset[Signal] = frozenset()
    requires: frozenset[Trait] = frozenset()
    moments: Literal["age", "zero"] = "age"
    silences_rows: bool = False
    resizes: bool = True
    selection_learner: Learner | None = None

    def initial_density(self, density: float) -> float:
        """The density a weight starts with whose final one is `density`; by default the same."""
        return density

    def selection(self, topology: Topology, generator: torch.Generator) -> Gate | None:
        """What is to choose among the units of a fresh `topology`; None: all of them stay."""
        return None

    def can_change(self, topology: Topology) -> bool:
        """Whether `topology` leaves the algorithm anything to decide."""
        return True

    def drop_fraction(self, step: int, total: int) -> float:
        """Share of active units that an update after `step` replaces; 0 where none ever does."""
        return 0.0

    @abc.abstractmethod
    def is_due(self, step: int, total: int) -> bool:
        """Whether topologies change once `step` of `total` optimizer steps are completed."""

    @abc.abstractmethod
    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        """The change of one topology, and the fraction of a unit to carry to the next update."""


class Static(Algorithm):
    """The initial topology stays."""

    resizes = False

    def __init__(self) -> None:
        """Takes nothing."""

    def can_change(self, topology: Topology) -> bool:
        return False

    def is_due(self, step: int, total: int) -> bool:
        return False

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        return Change(topology.active), carry


class Periodic(Algorithm):
    """Updates at regular intervals, until a share of the training is over.

    Args:
        fraction: alpha; the share of active units replaced at step t is
            alpha / 2 * (1 + cos(pi * t / (stop * total))) (RigL, section 3).
        interval: optimizer steps between updates.
        stop: share of training after which the topology is fixed.
        moments: `"age"` or `"zero"`, see `Algorithm`.
    """

    def __init__(
        self, *, fraction: float, interval: int, stop: float, moments: Literal["age", "zero"]
    ) -> None:
        require(interval >= 1, "dst.interval", interval, "at least 1 step")
        require(0 <= fraction <= 1, "dst.fraction", fraction, "a share in [0, 1]")
        require(0 <= stop <= 1, "dst.stop", stop, "a share of training in [0, 1]")
        self.fraction = fraction
        self.interval = interval
        self.stop = stop
        self.moments = moments

    def can_change(self, topology: Topology) -> bool:
        return 0 < len(topology.active) < int(topology.candidates.sum())

    def is_due(self, step: int, total: int) -> bool:
        return 0 < step < self.stop * total and step % self.interval == 0

    def drop_fraction(self, step: int, total: int) -> float:
        """Share of active units that are replaced at `step`."""
        share = min(step / (self.stop * total), 1.0) if self.stop else 1.0
        return self.fraction / 2 * (1 + math.cos(math.pi * share))


class DropGrow(Periodic):
    """Prune, drop globally, refill locally.

    Pools that have more than `counts` lets them keep are pruned to that. Then the lowest-scored
    units of the whole layer leave, a share of those that are left; and each pool is filled up to
    the number that `counts` gives it, by default what it lost, so that no budget can drift. A
    unit that left is a candidate again, and keeps its values when it returns.

    Args:
        drop: score of active units.
        grow: score of all units.
        counts: how many units each pool has after an update.
        fraction, interval, stop, moments: see `Periodic`. Where counts change, a last update at
            `stop` brings them to their target.
    """

    def __init__(
        self,
        *,
        drop: DropScore,
        grow: GrowScore,
        counts: Counts,
        fraction: float,
        interval: int,
        stop: float,
        moments: Literal["age", "zero"],
    ) -> None:
        super().__init__(fraction=fraction, interval=interval, stop=stop, moments=moments)
        require(
            counts.end <= stop, "dst.stop", stop, f"at least dst.counts.end={counts.end}, so that "
            "the last update reaches the density asked",
        )  # fmt: skip
        self.drop = drop
        self.grow = grow
        self.counts = counts
        self.resizes = not isinstance(counts, Constant)
        self.needs = drop.needs | grow.needs
        self.requires = drop.requires | grow.requires

    def initial_density(self, density: float) -> float:
        return self.counts.initial_density(density)

    def is_due(self, step: int, total: int) -> bool:
        closing = self.counts.end > 0 and step == math.ceil(self.stop * total)
        return closing or super().is_due(step, total)

    def can_change(self, topology: Topology) -> bool:
        shrinks = not torch.equal(topology.counts(), topology.target)
        return shrinks or super().can_change(topology)

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        progress = step / total
        counts, scores = self.counts(topology, progress), self.drop(topology, signals)
        kept, survivors = self.counts.kept(topology, progress), topology.active
        if not torch.equal(kept, topology.counts()):
            table = scores.new_full(topology.exists().shape, -torch.inf)
            table.view(-1)[topology.active] = scores
            active = best_of_each(table, kept).view(-1)
            scores, survivors = scores[active[topology.active]], active.nonzero().squeeze(1)

        # Few active units would round to zero drops for ever without the carry.
        wanted = self.drop_fraction(step, total) * len(survivors) + carry
        num_drop = max(0, min(math.floor(wanted), len(survivors)))
        leaving = best_of_each(-scores[None], num_drop)[0]
        left = topology.with_active(survivors[~leaving])

        taken = ~topology.exists()
        taken.view(-1).index_fill_(0, left.active, True)
        candidates = self.grow(left, signals).masked_fill(taken, -torch.inf)
        active = best_of_each(candidates, counts - left.counts()).view(-1)
        active.index_fill_(0, left.active, True)
        return Change(active.nonzero().squeeze(1)), wanted - num_drop
