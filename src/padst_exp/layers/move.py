"""The one map from an old topology to a new one: values, moments, births and averages follow it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from padst_exp.dst import Change
from padst_exp.permutations import is_bijection
from padst_exp.structures import Geometry, Storage, gather_entries, scatter_entries

if TYPE_CHECKING:
    from padst_exp.layers.sparse_weight import SparseWeight


class Move:
    """Carries whatever is shaped like the values of one weight over to its new topology.

    Args:
        change: what was decided.
        geometry: after the change.
        storage: of the weight.
        source: int64 `[N']`, old rows of the new units, or `[N', E]`, old flat places of the new
            entries; -1 where nothing was.
        old_entries: int64 `[N, E]`, flat positions before, for masked storage.
        values: the Parameter before.

    Attributes:
        old, new: the Parameter before and after; the same where the number of entries stays.
        num_grown: units that have at least one new entry.
    """

    def __init__(
        self,
        change: Change,
        geometry: Geometry,
        storage: Storage,
        source: Tensor,
        old_entries: Tensor | None,
        values: nn.Parameter,
    ) -> None:
        self.change = change
        self.geometry = geometry
        self.storage = storage
        self.source = source
        self.old_entries = old_entries
        self.old = self.new = values

    @cached_property
    def num_grown(self) -> int:
        """How many units start at zero, wholly or in part."""
        grown = self._new
        if grown.dim() == 2:
            inside = self.geometry.entries(self.change.active) < self._outside
            grown = (grown & inside).any(1)
        return int(grown.sum())

    @cached_property
    def _new(self) -> Tensor:
        """What starts at zero, bool, shaped like `source`."""
        return self.source < 0

    @cached_property
    def _places(self) -> Tensor:
        """Where everything is taken from, int64 and flat; anywhere for what is new."""
        return self.source.clamp(min=0).flatten()

    @property
    def num_new(self) -> int:
        """How many entries start at zero."""
        new = self._new if self.source.dim() == 2 else self._new[:, None]
        inside = self.geometry.entries(self.change.active) < self._outside
        return int((new & inside).sum())

    def __call__(self, tensor: Tensor, fill: float = 0.0, *, signed: bool = False) -> Tensor:
        """The new place of a tensor shaped like `values`, or packed `[N, 1]`.

        Args:
            tensor: what moves.
            fill: what is new gets.
            signed: whether it changes its sign where values do.
        """
        if self.storage == "packed":
            return self._packed(tensor, fill, signed)
        assert self.old_entries is not None
        moved = self._packed(gather_entries(tensor, self.old_entries), fill, signed)
        entries = self.geometry.entries(self.change.active)
        return scatter_entries(moved, entries, self.geometry.shape)

    def units(self, tensor: Tensor, fill: float = 0.0) -> Tensor:
        """The same for one number per unit, `[N]`; one made of several keeps the last one's."""
        source = self.source
        if source.dim() == 2:
            source = torch.where(source >= 0, source // source.shape[1], -1).amax(1)
        moved = tensor.index_select(0, source.clamp(min=0))
        return moved.masked_fill_(source < 0, fill)

    @property
    def _outside(self) -> int:
        return self.geometry.shape[0] * self.geometry.shape[1]

    def _packed(self, tensor: Tensor, fill: float, signed: bool) -> Tensor:
        if self.source.dim() == 1:
            moved = tensor.index_select(0, self._places)
            moved = moved.masked_fill_(self._new[:, None], fill)
        else:
            # One number for a whole unit becomes one for each entry.
            flat = tensor.expand(-1, self.source.shape[1]).flatten()
            moved = flat.index_select(0, self._places).view(self.source.shape)
            moved = moved.masked_fill_(self._new, fill)
        if signed and self.change.signs is not None:
            moved = moved * self.change.signs.to(moved.dtype)
        return moved


def plan(weight: SparseWeight, change: Change) -> Move:
    """The move of `weight` that `change` stands for.

    Raises:
        ValueError: the change does not fit the weight.
    """
    geometry, active = weight.geometry, change.active
    topology = weight.topology()
    check_active(geometry, active, topology.exists())
    if change.row_order is not None:
        order = change.row_order
        if order.shape != geometry.shape[:1] or not is_bijection(order):
            raise ValueError(f"row_order is no permutation of {geometry.shape[0]} rows")
        if weight.row_order is not order:
            geometry = geometry.with_row_order(order.to(weight.active.device, copy=True))
    before = topology.active
    masked = weight.storage == "masked"
    old_entries = weight.entries() if masked or geometry is not weight.geometry else None
    if change.source is not None:
        source = change.source
        _check_source(source, len(active), len(before), weight.geometry.unit_size)
        source = _inside(source, geometry, active)
    elif geometry is not weight.geometry:
        assert old_entries is not None
        source = _same_entries(old_entries, geometry.entries(active), geometry.shape)
    else:
        source = _same_units(before, active)
    return Move(change, geometry, weight.storage, source, old_entries, weight.values)


def check_active(geometry: Geometry, active: Tensor, exists: Tensor | None = None) -> None:
    """Raise a ValueError unless `active` are sorted ids, int64 `[N]`, of units of `geometry`.

    `exists` is what `geometry.exists` returns, where that is known already.
    """
    if active.dim() != 1 or active.is_floating_point() or not len(active):
        raise ValueError(f"active units are {tuple(active.shape)}, expected one list of ids")
    if not bool((active[1:] > active[:-1]).all()):
        raise ValueError("active units are not sorted, or not distinct")
    first, last = int(active[0]), int(active[-1])
    if first < 0 or last >= geometry.num_pools * geometry.pool_size:
        raise ValueError(f"there is no unit {first if first < 0 else last}")
    exists = geometry.exists(active.device) if exists is None else exists
    legal = exists.view(-1).index_select(0, active)
    if not bool(legal.all()):
        raise ValueError(f"there is no unit {int(active[~legal][0])}")


def _check_source(source: Tensor, units: int, old_units: int, unit_size: int) -> None:
    places = {(units,): old_units, (units, unit_size): old_units * unit_size}
    most = places.get(tuple(source.shape))
    if most is None:
        raise ValueError(f"source is {tuple(source.shape)}, expected one of {list(places)}")
    if bool(((source < -1) | (source >= most)).any()):
        raise ValueError(f"source reaches beyond the {most} old places")


def _inside(source: Tensor, geometry: Geometry, active: Tensor) -> Tensor:
    """`source` with -1 where a frame reaches over the edge of the weight: nothing moves there."""
    if geometry.exact_frames:
        return source
    if source.dim() == 1:
        steps = torch.arange(geometry.unit_size, device=source.device)
        source = torch.where(source < 0, -geometry.unit_size, source * geometry.unit_size)
        source = (source[:, None] + steps).clamp(min=-1)
    outside = geometry.shape[0] * geometry.shape[1]
    return source.masked_fill(geometry.entries(active) == outside, -1)


def _same_units(before: Tensor, active: Tensor) -> Tensor:
    """The old row of each unit that was active before, -1 for others; both are sorted."""
    place = torch.searchsorted(before, active.contiguous()).clamp(max=len(before) - 1)
    return torch.where(before[place] == active, place, -1)


def _same_entries(before: Tensor, entries: Tensor, shape: tuple[int, int]) -> Tensor:
    """The old flat place of each entry `[N', E]` that was active before, -1 for others."""
    outside = shape[0] * shape[1]
    table = torch.full((outside + 1,), -1, device=entries.device)
    table[before.flatten()] = torch.arange(before.numel(), device=entries.device)
    table[outside] = -1
    return table[entries]
