"""Topologies and hard permutations folded into the indices that kernels read.

Every function takes the layouts of the weights S of one product (several, as Q, K and V, where
their outputs are concatenated), the active `units` of each (int64 `[N]`), the permutation of their
input (int64 `[I]`, or None) and of each output (int64 `[O]`, or None). P_out S P_in is folded, with
(P x)[i] = x[index[i]].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from padst_exp.structures.layout import Layout
from padst_kernels.tiles import TileIndex, tile_index


def joined_output(
    layouts: Sequence[Layout], output_indices: Sequence[Tensor | None]
) -> Tensor | None:
    """One permutation of the concatenated outputs, int64 `[sum of O]`; None for the identity."""
    device = next((index.device for index in output_indices if index is not None), None)
    if device is None:
        return None
    heights = [layout.shape[0] for layout in layouts]
    starts = list(accumulate(heights, initial=0))[:-1]
    return torch.cat(
        [
            start + (torch.arange(height, device=device) if index is None else index)
            for start, height, index in zip(starts, heights, output_indices, strict=True)
        ]
    )


def joined_entries(layouts: Sequence[Layout], units: Sequence[Tensor]) -> Tensor:
    """Flat positions of all frames in the concatenated S, int64; sum of O times I where outside."""
    size = sum(layout.shape[0] * layout.shape[1] for layout in layouts)
    found, start = [], 0
    for layout, active in zip(layouts, units, strict=True):
        entries = layout.entries(active).flatten()
        outside = entries == layout.shape[0] * layout.shape[1]
        found.append(torch.where(outside, size, entries + start))
        start += layout.shape[0] * layout.shape[1]
    return torch.cat(found)


def permuted_entries(
    layouts: Sequence[Layout],
    units: Sequence[Tensor],
    input_index: Tensor | None,
    output_indices: Sequence[Tensor | None],
) -> Tensor:
    """Flat positions of all frames in P_out S P_in, int64; sum of O times I where outside.

    Cell (r, c) of S stands at (inverse(output_index)[r], input_index[c]).
    """
    num_rows, num_columns = sum(layout.shape[0] for layout in layouts), layouts[0].shape[1]
    entries = joined_entries(layouts, units)
    rows, columns = entries // num_columns, entries % num_columns
    if input_index is not None:
        columns = input_index[columns]
    output_index = joined_output(layouts, output_indices)
    if output_index is not None:
        rows = output_index.argsort()[rows.clamp(max=num_rows - 1)]
    outside = entries == num_rows * num_columns
    return torch.where(outside, entries, rows * num_columns + columns)


def permuted_tiles(
    layouts: Sequence[Layout],
    units: Sequence[Tensor],
    input_index: Tensor | None,
    output_indices: Sequence[Tensor | None],
    *,
    num_slices: int | None = None,
) -> TileIndex:
    """The index of all tiles in P_out S P_in; `layouts` must have tiles, all of one shape.

    `num_slices` is that of `tile_index`.
    """
    in_features, height = layouts[0].shape[1], layouts[0].frame[2]
    columns, owners, positions = [], [], []
    one_per_group, num_groups = True, 0
    for layout, active in zip(layouts, units, strict=True):
        tiles = layout.tiles(active)
        assert tiles is not None
        merged, groups = layout.merged_tiles, layout.num_row_groups
        # A tile that reaches over the edge reads zeros there.
        inside = tiles[0].clamp(max=in_features)
        columns.append(inside.reshape(len(inside) // merged, -1))
        owners.append(tiles[1][::merged] + num_groups)
        rows = layout.row_positions()
        rows = torch.arange(layout.shape[0]) if rows is None else rows
        positions.append(rows.to(active.device) + num_groups * height)
        # Tiles merge where each group has one; then they stand in the order of the groups.
        one_per_group &= len(columns[-1]) == groups and (merged > 1 or len(active) == 1)
        num_groups += groups
    places = torch.cat(positions)
    output_index = joined_output(layouts, output_indices)
    if output_index is not None:
        places = places[output_index]
    inputs = torch.cat(columns)
    if input_index is not None:
        inputs = torch.cat([input_index, input_index.new_tensor([in_features])])[inputs]
    return tile_index(
        inputs,
        None if one_per_group else torch.cat(owners),
        None if output_index is None and _in_order(layouts) else places,
        height=height,
        num_row_groups=num_groups,
        in_features=in_features,
        out_features=len(places),
        num_column_groups=layouts[0].num_column_groups,
        column_positions=_column_positions(layouts[0], input_index, inputs.device),
        num_slices=num_slices,
    )


def _in_order(layouts: Sequence[Layout]) -> bool:
    """Whether rows of y follow each other as the rows of all row groups do."""
    whole = all(layout.shape[0] % layout.frame[2] == 0 for layout in layouts[:-1])
    return whole and all(layout.row_positions() is None for layout in layouts)


def _column_positions(
    layout: Layout, input_index: Tensor | None, device: torch.device
) -> Tensor | None:
    """Where each feature of x stands among the column groups of a layout; None in order."""
    if layout.num_column_groups is None:
        return None
    positions = layout.column_positions()
    if positions is None and input_index is None:
        return None
    positions = torch.arange(layout.shape[1]) if positions is None else positions
    positions = positions.to(device)
    if input_index is None:
        return positions
    return torch.empty_like(positions).index_copy_(0, input_index, positions)
