"""Topologies as tables, and changes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Signal = Literal["dense_gradient", "weight_gradient", "coordinates", "age", "entries"]


@dataclass(frozen=True)
class Topology:
    """Which units of a weight are active; owner of counts, number of entries and density.

    Args:
        active: int64 `[N]`, sorted ids `pool * pool_size + index`.
        candidates: int64 `[P]`, units that exist in each pool.
        unit_sizes: int64 `[P]`, entries of each unit of a pool.
        pool_size: Q, units in the largest pool.
        shape: `(O, I)` of the weight.
        target: int64 `[P]`, the active units of each pool that the asked density stands for. What
            keeps the number of entries never needs it; what grows or shrinks ends there.
        is_output: whether the rows are the outputs of the whole model, none of which may vanish.
    """

    active: Tensor
    candidates: Tensor
    unit_sizes: Tensor
    pool_size: int
    shape: tuple[int, int]
    target: Tensor
    is_output: bool = False

    @property
    def size(self) -> int:
        """Entries of the weight if it were dense."""
        return self.shape[0] * self.shape[1]

    @property
    def num_pools(self) -> int:
        """P."""
        return len(self.candidates)

    @cached_property
    def pools(self) -> Tensor:
        """The pool of each active unit, int64 `[N]`."""
        return self.active // self.pool_size

    @cached_property
    def num_entries(self) -> int:
        """Entries of all active units."""
        return int((self.counts() * self.unit_sizes).sum())

    @property
    def density(self) -> float:
        """Share of the weight that is active."""
        return self.num_entries / self.size

    def counts(self) -> Tensor:
        """Active units of each pool, int64 `[P]`; not to be written to."""
        return self._counts

    @cached_property
    def _counts(self) -> Tensor:
        return torch.bincount(self.pools, minlength=self.num_pools)

    def exists(self) -> Tensor:
        """Bool `[P, Q]`, the slots that hold a unit; not to be written to."""
        return self._exists

    @cached_property
    def _exists(self) -> Tensor:
        # Lives as long as this topology does: from a decision until it is adopted.
        slots = torch.arange(self.pool_size, device=self.active.device)
        return slots < self.candidates[:, None]

    def with_active(self, active: Tensor) -> Topology:
        """The same weight with other active units, int64 `[N']`, sorted."""
        return Topology(
            active,
            self.candidates,
            self.unit_sizes,
            self.pool_size,
            self.shape,
            self.target,
            self.is_output,
        )


@dataclass(frozen=True, kw_only=True)
class Entries:
    """A weight entry by entry, for algorithms that cut it into other units.

    Args:
        weights: floating point `[O, I]`, zero where nothing is active.
        gradients: floating point `[O, I]`, as `Signals.dense_gradient`, before any mean.
        active: bool `[O, I]`.
        row_order: int64 `[O]`, the row of the weight at which each row of the geometry stands.
    """

    weights: Tensor
    gradients: Tensor
    active: Tensor
    row_order: Tensor


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What an algorithm may look at; what it does not name in `needs` is None.

    Args:
        magnitude: floating point `[N]`, root mean square of each active unit's values.
        generator: seeds every random choice; equal on all ranks.
        progress: completed steps over all steps of the training, in 0 .. 1.
        dense_gradient: floating point `[P, Q]`, root mean square of the loss gradient over each
            unit, active or not, averaged over micro-batches and ranks before.
        weight_gradient: floating point `[N]`, the same over active units, from the step's own
            gradient before any clipping.
        coordinates: int64 `[P * Q, 2]`, row and column of the first cell of every unit; -1 where
            no unit is.
        age: int64 `[N]`, completed steps since each active unit was grown.
        entries: single entries in place of units; comes with the dense gradient only.
    """

    magnitude: Tensor
    generator: torch.Generator
    progress: float
    dense_gradient: Tensor | None = None
    weight_gradient: Tensor | None = None
    coordinates: Tensor | None = None
    age: Tensor | None = None
    entries: Entries | None = None


@dataclass(frozen=True)
class Change:
    """A decided change of one topology.

    What is active before and after keeps its value and its optimizer state, whichever unit it
    belongs to; what is new starts at zero.

    Args:
        active: int64 `[N']`, the new sorted unit ids, as many as the algorithm likes.
        source: where other values are to move: int64 `[N']`, the old row of each new unit, or
            `[N', E]`, the old flat place `row * E + entry` of each new entry; -1 starts at zero.
        signs: `[N']` or `[N', E]`, 1 or -1: what values (and first moments) are multiplied by on
            their way; None: by 1.
        row_order: int64 `[O]`: from now on row r of the geometry stands at row `row_order[r]` of
            the weight (units are re-cut, DSB); None leaves the rows where they are.
    """

    active: Tensor
    source: Tensor | None = None
    signs: Tensor | None = None
    row_order: Tensor | None = None
