"""Topologies as tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Topology:
    """Which units of a layer are active.

    Args:
        active: int64 `[N]`, sorted ids `pool * pool_size + index`.
        candidates: int64 `[P]`, units that exist in each pool.
        pool_size: Q, units in the largest pool.
    """

    active: Tensor
    candidates: Tensor
    pool_size: int

    @property
    def num_pools(self) -> int:
        return len(self.candidates)

    def counts(self) -> Tensor:
        """Active units of each pool, int64 `[P]`."""
        return torch.bincount(self.active // self.pool_size, minlength=self.num_pools)

    def exists(self) -> Tensor:
        """Bool `[P, Q]`, the slots that hold a unit."""
        slots = torch.arange(self.pool_size, device=self.active.device)
        return slots < self.candidates[:, None]


@dataclass(frozen=True)
class Signals:
    """What an algorithm may look at.

    Args:
        weight: fp `[N]`, root mean square of each active unit's values.
        gradient: fp `[P, Q]`, root mean square of the loss gradient over each unit, active or
            not; None when the algorithm does not ask for it.
        generator: seeds every random choice; equal on all ranks.
    """

    weight: Tensor
    gradient: Tensor | None
    generator: torch.Generator


@dataclass(frozen=True)
class Relayout:
    """A decided change of topology. `source` moves values, moments and averages alike.

    Args:
        active: int64 `[N']`, the new sorted unit ids.
        source: int64 `[N']`, the old row of each new unit, -1 where it was grown.
    """

    active: Tensor
    source: Tensor

    @property
    def num_grown(self) -> int:
        return int((self.source < 0).sum())
