"""Dynamic sparse training algorithms. They know tables, never structures, and move nothing."""

from __future__ import annotations

import abc
import math
from typing import Literal

import torch

from padst_exp.dst.scores import DropScore, GrowScore
from padst_exp.dst.topology import Relayout, Signals, Topology
from padst_exp.errors import UserError
from padst_exp.pools import best_of_each


class Algorithm(abc.ABC):
    """Decides when and how the topology of a layer changes.

    Args:
        interval: optimizer steps between updates; ready permutations harden at these steps too.
    """

    moments: Literal["age", "zero"] = "age"
    needs_dense_gradient = False

    def __init__(self, *, interval: int) -> None:
        if interval < 1:
            raise UserError(f"dst.interval: expected at least 1 step, got {interval}")
        self.interval = interval

    @abc.abstractmethod
    def is_due(self, step: int, total: int) -> bool:
        """Whether topologies change once `step` of `total` optimizer steps are completed."""

    @abc.abstractmethod
    def rewire(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Relayout, float]:
        """The new topology of one layer and the fraction of a unit to carry to the next update."""


class Static(Algorithm):
    """The initial topology stays."""

    def __init__(self, *, interval: int) -> None:
        super().__init__(interval=interval)

    def is_due(self, step: int, total: int) -> bool:
        return False

    def rewire(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Relayout, float]:
        same = torch.arange(len(topology.active), device=topology.active.device)
        return Relayout(topology.active, same), carry


class DropGrow(Algorithm):
    """Drop globally, refill locally.

    The lowest-scored active units of the layer leave; each pool grows back as many as it lost, so
    no budget can drift. A dropped unit is a candidate again, and keeps its values when it returns.

    Args:
        drop: score of active units.
        grow: score of all units.
        fraction: alpha; the share of active units replaced at step t is
            alpha / 2 * (1 + cos(pi * t / (stop * total))) (RigL, section 3).
        interval: optimizer steps between updates.
        stop: share of training after which the topology is fixed.
        moments: `"age"`: bias corrections of a grown entry count from its birth; `"zero"`: from
            the start of training, as in the papers' code (its first steps are then up to 3.2
            times the learning rate at beta2 = 0.999).
    """

    def __init__(
        self,
        *,
        drop: DropScore,
        grow: GrowScore,
        fraction: float,
        interval: int,
        stop: float,
        moments: Literal["age", "zero"],
    ) -> None:
        super().__init__(interval=interval)
        if not 0 < fraction <= 1:
            raise UserError(f"dst.fraction: expected a share in (0, 1], got {fraction}")
        if not 0 <= stop <= 1:
            raise UserError(f"dst.stop: expected a share of training in [0, 1], got {stop}")
        self.drop = drop
        self.grow = grow
        self.fraction = fraction
        self.stop = stop
        self.moments = moments
        self.needs_dense_gradient = grow.needs_gradient

    def is_due(self, step: int, total: int) -> bool:
        return 0 < step < self.stop * total and step % self.interval == 0

    def drop_fraction(self, step: int, total: int) -> float:
        """Share of active units that are replaced at `step`."""
        return self.fraction / 2 * (1 + math.cos(math.pi * step / (self.stop * total)))

    def rewire(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Relayout, float]:
        num_active = len(topology.active)
        # Few active units would round to zero drops for ever without the carry.
        wanted = self.drop_fraction(step, total) * num_active + carry
        num_drop = min(math.floor(wanted), num_active)

        leaving = best_of_each(
            -self.drop(topology, signals)[None], torch.tensor([num_drop], device=_device(topology))
        )[0]
        survivors = Topology(topology.active[~leaving], topology.candidates, topology.pool_size)
        lost = topology.counts() - survivors.counts()

        open_slots = topology.exists()
        open_slots.view(-1)[survivors.active] = False
        scores = self.grow(survivors, signals).masked_fill(~open_slots, -torch.inf)
        coming = best_of_each(scores, lost).flatten().nonzero().squeeze(1)

        active = torch.cat([survivors.active, coming]).sort().values
        row_of = torch.full((open_slots.numel(),), -1, device=_device(topology))
        row_of[topology.active] = torch.arange(num_active, device=_device(topology))
        return Relayout(active, row_of[active]), wanted - num_drop


def _device(topology: Topology) -> torch.device:
    return topology.active.device
