"""The index tensors of a grouped gather GEMM, derived once for each topology."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TileIndex(NamedTuple):
    """Where the tiles of a weight `[G, K, V]` stand in a matrix `[O, I]`. All int32.

    Attributes:
        columns: `[G, K]`, feature of x behind each column; I marks padding, read as zero. The
            tiles of a row group follow each other.
        rows: `[R * V]`, feature of y behind each row of the row groups, O where none is; None
            when in natural order.
        row_pointer: `[R + 1]`, places in `columns` where each row group begins; None when tile r
            is row group r.
        order: `[G]`, the tile of the weight at each place in `columns`; None like `row_pointer`.
        column_pointer: `[I + 1]`, places in `slots` where each feature of x begins.
        slots: `[G * K]`, columns g * K + k of the weight's tiles, sorted by their feature of x.
        tile_rows: `[G, V]`, feature of y behind each row of the weight's tiles.
    """

    columns: Tensor
    rows: Tensor | None
    row_pointer: Tensor | None
    order: Tensor | None
    column_pointer: Tensor
    slots: Tensor
    tile_rows: Tensor


def tile_index(
    columns: Tensor,
    owner: Tensor | None,
    positions: Tensor | None,
    *,
    height: int,
    num_row_groups: int,
    in_features: int,
    out_features: int,
) -> TileIndex:
    """Derive the index of tiles that own `columns` and add to row groups `owner`.

    Args:
        columns: int64 `[G, K]`, feature of x behind each column of a tile; I for padding.
        owner: int64 `[G]`, the row group each tile adds to; None when tile g is row group g.
        positions: int64 `[O]`, distinct: feature o of y is row v of row group r where
            positions[o] = r * V + v. None for the identity.
        height: V.
        num_row_groups: R.
        in_features: I.
        out_features: O, at most R * V.
    """
    device = columns.device
    by_feature = columns.flatten().sort(stable=True)
    features = torch.arange(in_features + 1, device=device)
    rows = None
    if positions is not None:
        rows = torch.full((num_row_groups * height,), out_features, device=device)
        rows[positions] = torch.arange(out_features, device=device)
    all_rows = torch.arange(num_row_groups * height, device=device) if rows is None else rows
    tile_rows = all_rows.clamp(max=out_features).view(num_row_groups, height)
    row_pointer = order = None
    if owner is not None:
        tile_rows = tile_rows[owner]
        owner, order = owner.sort(stable=True)
        groups = torch.arange(num_row_groups + 1, device=device)
        row_pointer = torch.searchsorted(owner, groups)
        columns = columns[order]
    return TileIndex(
        columns=columns.int(),
        rows=None if rows is None else rows.int(),
        row_pointer=None if row_pointer is None else row_pointer.int(),
        order=None if order is None else order.int(),
        column_pointer=torch.searchsorted(by_feature.values, features).int(),
        slots=by_feature.indices.int(),
        tile_rows=tile_rows.int(),
    )
