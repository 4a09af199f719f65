"""Units and pools: the geometry of one sparse weight, shared by every structure.

A weight of shape `[O, I]` is cut into units (what lives or dies as one) and units into pools (who
competes with whom). Units of one pool have equal size. An entry belongs to at most one unit; what
belongs to none can never be active. Which units are active is no business of a geometry: that is a
topology, one sorted vector of unit ids `pool * pool_size + index_in_pool`.

Shape letters: O, I weight rows and columns; P pools; Q units in the largest pool; N active units;
E entries in the frame of a unit (ragged units leave part of their frame empty).
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from padst_exp.pools import Symmetry, Trait

# Rows of a tile from which on it multiplies as a whole: lower ones would leave most of a vector
# empty, and go to the kernels of single entries.
MIN_TILE_HEIGHT = 8


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """What the kernels of tiles see of a geometry: every unit is one dense tile or several.

    Args:
        width: columns of a tile.
        height: rows of a tile, at least `MIN_TILE_HEIGHT`.
        locate: maps units `[N]` to the columns of their tiles, int64 `[N * tiles, width]` (>= I
            outside the weight), and to their row groups, int64 `[N * tiles]`.
        num_row_groups: how many groups of `height` rows there are.
        row_positions: int64 `[O]`, where each weight row stands among the row groups; None when
            rows follow each other as the groups do.
        ascending: ascending units have ascending row groups, so that neighbours which share one
            multiply as one wider tile.
        num_column_groups: into how many equal groups of inputs the columns of every tile fall, one
            group each, so that the transpose is of the same family and the gradient of the input
            as fast as the product; None where they do not.
        column_positions: int64 `[I]`, where each input stands among the column groups; None when
            in natural order.
    """

    width: int
    height: int
    locate: Callable[[Tensor], tuple[Tensor, Tensor]]
    num_row_groups: int
    row_positions: Tensor | None = None
    ascending: bool = False
    num_column_groups: int | None = None
    column_positions: Tensor | None = None


class Geometry(abc.ABC):
    """Units and pools of one weight `[O, I]`. Immutable, and knows no counts.

    Args:
        shape: `(O, I)`.
        candidates: int64 `[P]`, how many units each pool has.
        unit_sizes: int64 `[P]`, entries in each unit of a pool.
        frame: `(tiles, width, height)`; a unit's values are `tiles` dense tiles of `width` columns
            and `height` rows, rows fastest. E is the product.

    Attributes:
        row_order: int64 `[O]`, at which row of the weight each row of the geometry stands; None in
            natural order. See `with_row_order`.
        traits: what algorithms may require of units and pools.
        chunk: width of the runs of neighbouring inputs that pools are, each of some rows; None
            where they are something else, or of several widths.
    """

    traits: frozenset[Trait] = frozenset()
    chunk: int | None = None

    def __init__(
        self,
        *,
        shape: tuple[int, int],
        candidates: Tensor,
        unit_sizes: Tensor,
        frame: tuple[int, int, int],
    ) -> None:
        self.shape = shape
        self.candidates = candidates
        self.unit_sizes = unit_sizes
        self.frame = frame
        self.num_pools = len(candidates)
        self.pool_size = int(candidates.max())
        self.unit_size = math.prod(frame)
        self.row_order: Tensor | None = None
        # Where this is False, part of some frames lies outside the weight and must stay zero.
        self.exact_frames = bool((unit_sizes == self.unit_size).all())
        self.full_pools = bool((candidates == self.pool_size).all())
        entries = int(candidates.sum()) * self.unit_size
        self.tiles_whole_weight = self.exact_frames and entries == shape[0] * shape[1]

    @abc.abstractmethod
    def cells(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns, int64 `[N, E]` each, of the frames of `units` (int64 `[N]` ids).

        Rows are those of the geometry, before `row_order`. Cells of a frame that lie outside the
        weight have a row >= O or a column >= I.
        """

    def tiling(self) -> Tiling | None:
        """How units multiply as tiles; None where entries multiply one by one."""
        return None

    def diagonal_offsets(self, units: Tensor) -> Tensor | None:
        """Int64 `[N]`, the offsets of `units` that are single diagonals; None for all others."""
        return None

    def symmetry(self, side: str) -> Symmetry:
        """Which permutations of the features on `side` ("in" or "out") it cannot see."""
        found = self._symmetry(side)
        if side == "in" or self.row_order is None:
            return found
        return replace(found, labels=found.labels[self.row_order.cpu().argsort()])

    def _symmetry(self, side: str) -> Symmetry:
        """The same before `row_order`; by default all features are interchangeable."""
        return Symmetry(labels=torch.zeros(self._features(side), dtype=torch.int64))

    def _features(self, side: str) -> int:
        return self.shape[1] if side == "in" else self.shape[0]

    def with_row_order(self, order: Tensor | None) -> Geometry:
        """The same geometry with its row r at row `order[r]` of the weight (int64 `[O]`)."""
        other = copy.copy(self)
        other.row_order = order
        return other

    def entries(self, units: Tensor) -> Tensor:
        """Flat positions row * I + column of the frames, int64 `[N, E]`; O * I where outside."""
        rows, columns = self.cells(units)
        num_rows, num_columns = self.shape
        if self.exact_frames:
            rows = rows if self.row_order is None else self.row_order.to(rows.device)[rows]
            return torch.add(columns, rows, alpha=num_columns)
        inside = (rows < num_rows) & (columns < num_columns)
        if self.row_order is not None:
            rows = self.row_order.to(rows.device)[rows.clamp(max=num_rows - 1)]
        flat = torch.add(columns, rows, alpha=num_columns)
        return torch.where(inside, flat, num_rows * num_columns)

    def row_positions(self) -> Tensor | None:
        """Int64 `[O]`, where weight rows stand among the row groups of `tiling`; None in order."""
        tiling = self.tiling()
        positions = None if tiling is None else tiling.row_positions
        if self.row_order is None:
            return positions
        at = self.row_order.argsort()
        return at if positions is None else positions.to(at.device)[at]

    def exists(self, device: torch.device | None = None) -> Tensor:
        """Which slots of the pools hold a unit, bool `[P, Q]`."""
        return torch.arange(self.pool_size, device=device) < self.candidates.to(device)[:, None]

    def unit_ids(self, device: torch.device | None = None) -> Tensor:
        """Ids of all existing units, sorted, int64."""
        return self.exists(device).flatten().nonzero().squeeze(1)

    def coordinates(self, device: torch.device | None = None) -> Tensor:
        """Row and column of the first cell of every unit, int64 `[P * Q, 2]`; -1 where none is."""
        units = self.unit_ids(device)
        entries, num_columns = self.entries(units)[:, 0], self.shape[1]
        table = torch.full((self.num_pools * self.pool_size, 2), -1, device=units.device)
        table[units] = torch.stack([entries // num_columns, entries % num_columns], 1)
        return table

    def random_scores(self, generator: torch.Generator) -> Tensor:
        """Numbers `[P, Q]` whose largest are a random topology; uniform, unless units cluster."""
        return torch.rand(self.num_pools, self.pool_size, generator=generator)

    def frames(self, dense: Tensor) -> Tensor:
        """Values `[U, E]` of the frames of all existing units in `dense` `[O, I]`."""
        if self.tiles_whole_weight and self.row_order is None:
            return self._permuted_axes(dense)
        return self._gathered(dense)

    def _permuted_axes(self, dense: Tensor) -> Tensor:
        """The same where frames tile the weight: for grids, `dense` with its axes rearranged."""
        return self._gathered(dense)

    def _gathered(self, dense: Tensor) -> Tensor:
        return gather_entries(dense, self.entries(self.unit_ids(dense.device)))

    def unit_rms(self, dense: Tensor, exists: Tensor | None = None) -> Tensor:
        """Root mean square of `dense` `[O, I]` over every unit: `[P, Q]`, 0 where none exists.

        Args:
            dense: floating point.
            exists: what `exists` returns, where that is known already.
        """
        frames = self.frames(dense)
        if self.full_pools and self.exact_frames:
            return _rms(frames, self.unit_size).view(self.num_pools, self.pool_size)
        exists = self.exists(dense.device) if exists is None else exists
        sizes: Tensor | int = self.unit_size
        if not self.exact_frames:
            sizes = self.unit_sizes.to(dense.device)[:, None].expand_as(exists)[exists]
        return dense.new_zeros(exists.shape).masked_scatter_(exists, _rms(frames, sizes))

    def frame_rms(self, values: Tensor, units: Tensor) -> Tensor:
        """Root mean square `[N]` of unit frames `values` `[N, E]` (zero outside the weight)."""
        sizes: Tensor | int = self.unit_size
        if not self.exact_frames:
            sizes = self.unit_sizes.to(values.device)[units // self.pool_size]
        return _rms(values, sizes)


def _rms(values: Tensor, sizes: Tensor | int) -> Tensor:
    """Root mean square `[N]` of `values` `[N, E]`, of which `sizes` (`[N]`) count in each row."""
    if values.shape[1] == 1:
        return values.abs().squeeze(1)
    top, scale = max(abs(float(end)) for end in values.aminmax()), 1.0
    if not 1e-9 < top < 1e9:
        # Squares would vanish, or overflow; a power of two rounds nothing.
        scale = 2.0 ** math.frexp(max(top, torch.finfo(values.dtype).tiny))[1]
        values = values / scale
    rms = (values.square().sum(1) / sizes).sqrt_()
    return rms if scale == 1.0 else rms.mul_(scale)


def gather_entries(dense: Tensor, entries: Tensor) -> Tensor:
    """Values of `dense` `[O, I]` at flat `entries` (any shape), zero where they are O * I."""
    flat = torch.cat([dense.flatten(), dense.new_zeros(1)])
    # Several times as fast as indexing by a matrix.
    return flat.index_select(0, entries.flatten()).view(entries.shape)


def scatter_entries(values: Tensor, entries: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense `[O, I]` weight that holds `values` at flat `entries` and zeros elsewhere.

    Differentiable in `values`.
    """
    size = shape[0] * shape[1]
    flat = values.new_zeros(size + 1)
    return flat.index_put((entries.flatten(),), values.flatten())[:size].view(shape)
