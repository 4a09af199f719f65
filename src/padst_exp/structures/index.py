"""From topologies and hard permutations to the indices that kernels gather by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from padst_exp.structures.geometry import Geometry, Tiling
from padst_kernels.tiles import TileIndex, tile_index


@dataclass(frozen=True)
class Folding:
    """P_out S P_in, with the hard permutations folded into S; (P x)[i] = x[index[i]].

    S is one weight, or several (Q, K and V) that read one input and whose outputs are concatenated.

    Args:
        geometries: of the weights.
        units: active units of each weight, int64 `[N]`, sorted.
        input_index: permutation of the input, int64 `[I]`, or None for the identity.
        output_indices: permutation of each output, int64 `[O]`, or None.
    """

    geometries: Sequence[Geometry]
    units: Sequence[Tensor]
    input_index: Tensor | None
    output_indices: Sequence[Tensor | None]

    @property
    def in_features(self) -> int:
        """I."""
        return self.geometries[0].shape[1]

    @property
    def out_features(self) -> int:
        """Sum of O."""
        return sum(geometry.shape[0] for geometry in self.geometries)

    @property
    def device(self) -> torch.device:
        """Where the topologies are."""
        return self.units[0].device

    def __getitem__(self, part: slice) -> Folding:
        """The same for some of the weights."""
        return Folding(
            self.geometries[part], self.units[part], self.input_index, self.output_indices[part]
        )

    @cached_property
    def output_index(self) -> Tensor | None:
        """One permutation of the concatenated outputs, int64 `[sum of O]`; None: the identity."""
        if all(index is None for index in self.output_indices):
            return None
        heights = [geometry.shape[0] for geometry in self.geometries]
        starts = accumulate(heights, initial=0)
        return torch.cat(
            [
                start + (torch.arange(height, device=self.device) if index is None else index)
                for start, height, index in zip(starts, heights, self.output_indices, strict=False)
            ]
        )

    @cached_property
    def entries(self) -> Tensor:
        """Flat positions of all frames in the concatenated S, int64; sum of O times I outside."""
        size = self.out_features * self.in_features
        found, start = [], 0
        for geometry, active in zip(self.geometries, self.units, strict=True):
            entries = geometry.entries(active).flatten()
            end = geometry.shape[0] * geometry.shape[1]
            found.append(torch.where(entries == end, size, entries + start))
            start += end
        return torch.cat(found)

    @cached_property
    def permuted_entries(self) -> Tensor:
        """The same in P_out S P_in: cell (r, c) stands at (inverse(output)[r], input[c])."""
        num_rows, num_columns = self.out_features, self.in_features
        rows, columns = self.entries // num_columns, self.entries % num_columns
        if self.input_index is not None:
            columns = self.input_index[columns]
        if self.output_index is not None:
            rows = self.output_index.argsort()[rows.clamp(max=num_rows - 1)]
        outside = self.entries == num_rows * num_columns
        return torch.where(outside, self.entries, rows * num_columns + columns)

    def live_rows(self) -> Tensor:
        """Which rows of P_out S P_in have entries, bool `[sum of O]`."""
        rows = self.permuted_entries // self.in_features
        counts = torch.bincount(rows.flatten(), minlength=self.out_features + 1)
        return counts[: self.out_features] > 0


def tile_shape(geometry: Geometry, units: Tensor) -> tuple[int, int] | None:
    """Columns and rows of the tiles that `units` multiply as; None where single entries do.

    Tiles of one row group merge to wider ones, as far as the row groups allow that have any.
    """
    tiling = geometry.tiling()
    if tiling is None:
        return None
    return tiling.width * _merge(tiling, tiling.locate(units)[1]), tiling.height


def _merge(tiling: Tiling, groups: Tensor) -> int:
    """How many neighbouring tiles multiply as one."""
    if not tiling.ascending:
        return 1
    counts = torch.bincount(groups, minlength=tiling.num_row_groups)
    return max(1, math.gcd(*counts.tolist()))


def permuted_tiles(folding: Folding, *, num_slices: int | None = None) -> tuple[TileIndex, int]:
    """The index of all tiles of a folding, and their width.

    Args:
        folding: its geometries must have tiles, all of one height.
        num_slices: see `tile_index`.
    """
    tilings = [_tiling(geometry) for geometry in folding.geometries]
    located = [tiling.locate(units) for tiling, units in zip(tilings, folding.units, strict=True)]
    merged = math.gcd(*(_merge(t, groups) for t, (_, groups) in zip(tilings, located, strict=True)))
    height, in_features = tilings[0].height, folding.in_features
    columns, owners, positions = [], [], []
    one_per_group, num_groups = True, 0
    for geometry, tiling, (tiles, groups) in zip(folding.geometries, tilings, located, strict=True):
        # A tile that reaches over the edge reads zeros there.
        columns.append(tiles.clamp(max=in_features).reshape(len(tiles) // merged, -1))
        owners.append(groups[::merged] + num_groups)
        at = geometry.row_positions()
        at = torch.arange(geometry.shape[0]) if at is None else at
        positions.append(at.to(folding.device) + num_groups * height)
        # As many tiles as row groups are not one for each: a group may have two, another none.
        in_turn = torch.arange(num_groups, num_groups + tiling.num_row_groups)
        one_per_group &= tiling.ascending and torch.equal(owners[-1], in_turn.to(groups.device))
        num_groups += tiling.num_row_groups
    places = torch.cat(positions)
    if folding.output_index is not None:
        places = places[folding.output_index]
    inputs = torch.cat(columns)
    if folding.input_index is not None:
        permuted = folding.input_index
        inputs = torch.cat([permuted, permuted.new_tensor([in_features])])[inputs]
    in_order = folding.output_index is None and _in_order(folding.geometries, tilings)
    index = tile_index(
        inputs,
        None if one_per_group else torch.cat(owners),
        None if in_order else places,
        height=height,
        num_row_groups=num_groups,
        in_features=in_features,
        out_features=len(places),
        num_column_groups=tilings[0].num_column_groups,
        column_positions=_column_positions(tilings[0], folding),
        num_slices=num_slices,
    )
    return index, inputs.shape[1]


def _tiling(geometry: Geometry) -> Tiling:
    tiling = geometry.tiling()
    assert tiling is not None, "single entries have no tiles"
    return tiling


def _in_order(geometries: Sequence[Geometry], tilings: Sequence[Tiling]) -> bool:
    """Whether rows of y follow each other as the rows of all row groups do."""
    whole = all(
        geometry.shape[0] == tiling.num_row_groups * tiling.height
        for geometry, tiling in list(zip(geometries, tilings, strict=True))[:-1]
    )
    return whole and all(geometry.row_positions() is None for geometry in geometries)


def _column_positions(tiling: Tiling, folding: Folding) -> Tensor | None:
    """Where each feature of x stands among the column groups of a tiling; None in order."""
    if tiling.num_column_groups is None:
        return None
    positions = tiling.column_positions
    if positions is None:
        if folding.input_index is None:
            return None
        positions = torch.arange(folding.in_features)
    positions = positions.to(folding.device)
    if folding.input_index is None:
        return positions
    return torch.empty_like(positions).index_copy_(0, folding.input_index, positions)
