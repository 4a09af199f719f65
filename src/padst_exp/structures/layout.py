"""Units and pools: the geometry of one sparse weight, shared by every structure.

A weight of shape `[O, I]` is cut into units (what lives or dies as one) and units into pools (who
competes with whom). Every entry belongs to exactly one unit. Pool `p` always keeps `counts[p]`
active units, so a layer's budget cannot drift, and the topology of any layer is one sorted vector
of active unit ids, `pool * pool_size + index_in_pool`.

Shape letters: O, I weight rows and columns; P pools; Q units in the largest pool; N active units;
E entries in the frame of a unit (ragged units leave part of their frame empty).
"""

from __future__ import annotations

import abc
import math
from functools import cached_property

import torch
from torch import Tensor

from padst_exp.pools import best_of_each

# Rows of a tile from which on it multiplies as a whole: lower ones would leave most of a vector
# empty, and go to the kernels of single entries.
MIN_TILE_HEIGHT = 8


class Layout(abc.ABC):
    """Geometry of one weight `[O, I]` at one density. Immutable and stateless.

    Args:
        shape: `(O, I)`.
        candidates: int64 `[P]`, how many units each pool has.
        unit_sizes: int64 `[P]`, entries in each unit of a pool.
        counts: int64 `[P]`, active units each pool keeps.
        frame: `(tiles, width, height)`; a unit's values are `tiles` dense tiles of `width` columns
            and `height` rows, rows fastest. E is the product.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int],
        candidates: Tensor,
        unit_sizes: Tensor,
        counts: Tensor,
        frame: tuple[int, int, int],
    ) -> None:
        self.shape = shape
        self.candidates = candidates
        self.unit_sizes = unit_sizes
        self.counts = counts
        self.frame = frame
        self.num_pools = len(candidates)
        self.pool_size = int(candidates.max())
        self.unit_size = math.prod(frame)
        self.num_active = int(counts.sum())
        self.num_entries = int((counts * unit_sizes).sum())
        self.density = self.num_entries / (shape[0] * shape[1])
        # Where this is False, part of some frames lies outside the weight and must stay zero.
        self.exact_frames = bool((unit_sizes == self.unit_size).all())

    @abc.abstractmethod
    def cells(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns, int64 `[N, E]` each, of the frames of `units` (int64 `[N]` ids).

        Cells of a frame that lie outside the weight have a row >= O or a column >= I.
        """

    def tiles(self, units: Tensor) -> tuple[Tensor, Tensor] | None:
        """Columns `[N * tiles, width]` and row group `[N * tiles]` of every tile, or None.

        None where tiles would be lower than `MIN_TILE_HEIGHT`: entries multiply singly instead.
        """
        return None

    # How many consecutive tiles always share one row group; they multiply as one wider tile.
    merged_tiles: int = 1

    @cached_property
    def tile_shape(self) -> tuple[int, int] | None:
        """Columns and rows `(K, V)` of the tiles that multiply; None where `tiles` is."""
        first = self.tiles(torch.zeros(1, dtype=torch.int64))
        return None if first is None else (first[0].shape[1] * self.merged_tiles, self.frame[2])

    @property
    def num_row_groups(self) -> int:
        """Row groups of `tiles`; `row_positions` maps weight rows into them."""
        return -(-self.shape[0] // self.frame[2])

    def row_positions(self) -> Tensor | None:
        """Int64 `[O]`, where row r stands among the row groups; None when in natural order."""
        return None

    # Whether units hold one entry each, and ascending ids mean ascending rows.
    by_row: bool = False

    # Where the columns of every tile are one of so many equal groups of inputs, the transpose is
    # of the same family, and the gradient of the input as fast as the product.
    num_column_groups: int | None = None

    def column_positions(self) -> Tensor | None:
        """Int64 `[I]`, where input c stands among the column groups; None when in natural order."""
        return None

    def offsets(self, units: Tensor) -> Tensor | None:
        """Int64 `[N]`, the offsets of `units` that are single diagonals; None for all others."""
        return None

    def symmetry(self, side: str) -> Tensor | None:
        """Classes of interchangeable features on `side` ("in" or "out"), int64 `[d]`.

        A permutation that maps whole classes to whole classes only relabels topologies of this
        structure. None stands for the cyclic group: shifts are the symmetries.
        """
        return torch.zeros(self.shape[1] if side == "in" else self.shape[0], dtype=torch.int64)

    def entries(self, units: Tensor) -> Tensor:
        """Flat positions row * I + column of the frames, int64 `[N, E]`; O * I where outside."""
        rows, columns = self.cells(units)
        num_rows, num_columns = self.shape
        if self.exact_frames:
            return rows * num_columns + columns
        inside = (rows < num_rows) & (columns < num_columns)
        return torch.where(inside, rows * num_columns + columns, num_rows * num_columns)

    def unit_ids(self, device: torch.device | None = None) -> Tensor:
        """Ids of all existing units, sorted, int64."""
        slots = torch.arange(self.pool_size, device=device)
        exists = slots < self.candidates.to(device)[:, None]
        return exists.flatten().nonzero().squeeze(1)

    def unit_rms(self, dense: Tensor) -> Tensor:
        """Root mean square of `dense` `[O, I]` over every unit: `[P, Q]`, 0 where none exists."""
        units = self.unit_ids(dense.device)
        table = dense.new_zeros(self.num_pools * self.pool_size)
        table[units] = self.frame_rms(gather_entries(dense, self.entries(units)), units)
        return table.view(self.num_pools, self.pool_size)

    def frame_rms(self, values: Tensor, units: Tensor) -> Tensor:
        """Root mean square `[N]` of unit frames `values` `[N, E]` (zero outside the weight)."""
        sizes = self.unit_sizes.to(values.device)[units // self.pool_size]
        return (values.square().sum(1) / sizes).sqrt()

    def random_units(self, generator: torch.Generator) -> Tensor:
        """A uniformly random topology: int64 `[N]` sorted unit ids."""
        return self.best_units(torch.rand(self.num_pools, self.pool_size, generator=generator))

    def best_units(self, scores: Tensor) -> Tensor:
        """The topology with the highest `scores` `[P, Q]` in every pool, ties to lower ids."""
        exists = torch.arange(self.pool_size) < self.candidates[:, None]
        ranked = scores.cpu().masked_fill(~exists, -torch.inf)
        return best_of_each(ranked, self.counts).flatten().nonzero().squeeze(1)


def gather_entries(dense: Tensor, entries: Tensor) -> Tensor:
    """Values of `dense` `[O, I]` at flat `entries` (any shape), zero where they are O * I."""
    flat = torch.cat([dense.flatten(), dense.new_zeros(1)])
    # Several times as fast as indexing by a matrix.
    return flat.index_select(0, entries.flatten()).view(entries.shape)


def scatter_entries(values: Tensor, entries: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense `[O, I]` weight that holds `values` at flat `entries` and zeros elsewhere."""
    size = shape[0] * shape[1]
    flat = values.new_zeros(size + 1)
    flat[entries.flatten()] = values.flatten()
    return flat[:size].view(shape)


def share_budget(budget: float, candidates: Tensor, unit_sizes: Tensor) -> Tensor:
    """Active units per pool, int64 `[P]`, whose entries come nearest to `budget` entries.

    Every pool first gets the whole part of its proportional share; what remains goes one unit at
    a time to the pools with the largest fractional parts (largest remainder, ties to the lower
    pool), as long as a unit brings the total closer. Among pools of equal size counts therefore
    differ by at most one, and the total is within one unit of the budget.
    """
    density = budget / float((candidates * unit_sizes).sum())
    share = candidates.double() * density
    counts = share.floor().clamp(max=candidates).to(torch.int64)
    left = budget - float((counts * unit_sizes).sum())
    # Rounding keeps 0.1 * 30 from losing its unit to a share of 2.9999999999999996.
    remainder = (share - counts).round(decimals=9)
    for pool in remainder.sort(descending=True, stable=True).indices.tolist():
        size = int(unit_sizes[pool])
        if counts[pool] < candidates[pool] and abs(left - size) < abs(left):
            counts[pool] += 1
            left -= size
    return counts
