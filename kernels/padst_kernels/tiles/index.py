"""The index tensors of a grouped gather GEMM, derived once for each topology."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TileIndex(NamedTuple):
    """Where the tiles of a weight `[G, K, V]` stand in a matrix `[O, I]`. All int32.

    Which fields are None, and every shape, depend on the structure and on which permutations there
    are, never on the topology: a new one can be copied into the tensors of the old.

    Attributes:
        columns: `[G, K]`, feature of x behind each column; I marks padding, read as zero. The
            tiles of a row group follow each other.
        rows: `[R * V]`, feature of y behind each row of the row groups, O where none is; None
            when in natural order.
        row_pointer: `[R + 1]`, places in `columns` where each row group begins; None when tile r
            is row group r.
        order: `[G]`, the tile of the weight at each place in `columns`; None like `row_pointer`.
        column_pointer: `[I + 1]`, places in `slots` where each feature of x begins.
        slots: `[G * K]`, columns g * K + k of the weight's tiles, sorted by their feature of x;
            None where the transpose is known.
        tile_rows: `[G, V]`, feature of y behind each row of the weight's tiles; None like `slots`.
        transposed_columns: `[G, V]`, with the next three what `columns`, `rows`, `row_pointer` and
            `order` are, of the transpose: its row groups are groups of K inputs. All None where
            the columns of a tile are no group of a partition.
        transposed_rows: `[C * K]`, None when in natural order.
        transposed_pointer: `[C + 1]`.
        transposed_order: `[G]`.
        slice_entries: `[S, G, K]`, see cuda/; None unless asked for.
    """

    columns: Tensor
    rows: Tensor | None
    row_pointer: Tensor | None
    order: Tensor | None
    column_pointer: Tensor
    slots: Tensor | None = None
    tile_rows: Tensor | None = None
    transposed_columns: Tensor | None = None
    transposed_rows: Tensor | None = None
    transposed_pointer: Tensor | None = None
    transposed_order: Tensor | None = None
    slice_entries: Tensor | None = None

    @property
    def in_features(self) -> int:
        """I."""
        return self.column_pointer.shape[0] - 1

    @property
    def column_run(self) -> int:
        """How many neighbouring inputs each aligned run of `columns` is known to consist of."""
        natural = self.transposed_pointer is not None and self.transposed_rows is None
        return self.columns.shape[1] if natural else 1

    def row_run(self, height: int) -> int:
        """How many neighbouring outputs each aligned run of rows consists of; `height` is V."""
        return height if self.rows is None else 1


def tile_index(
    columns: Tensor,
    owner: Tensor | None,
    positions: Tensor | None,
    *,
    height: int,
    num_row_groups: int,
    in_features: int,
    out_features: int,
    num_column_groups: int | None = None,
    column_positions: Tensor | None = None,
    num_slices: int | None = None,
) -> TileIndex:
    """Derive the index of tiles that own `columns` and add to row groups `owner`.

    Where the columns of every tile are one group of a partition of the inputs (blocks, strided
    diagonals), `num_column_groups` says so, and dX runs as a product of its own.

    Args:
        columns: int64 `[G, K]`, feature of x behind each column of a tile; I for padding.
        owner: int64 `[G]`, the row group each tile adds to; None when tile g is row group g.
        positions: int64 `[O]`, distinct: feature o of y is row v of row group r where
            positions[o] = r * V + v. None for the identity.
        height: V.
        num_row_groups: R.
        in_features: I, at most C * K where C is given.
        out_features: O, at most R * V.
        num_column_groups: C, or None when there is no such partition.
        column_positions: int64 `[I]`, distinct: feature i of x is column k of column group c where
            column_positions[i] = c * K + k. None for the identity.
        num_slices: S, for backend "cuda", where there are no column groups; None without it.

    Raises:
        ValueError: the columns of a tile are not one of the groups.
    """
    rows = None
    if positions is not None:
        rows = _behind(positions, num_row_groups * height)
    tile_rows = _groups(rows, num_row_groups, height, out_features, columns.device)
    if owner is not None:
        tile_rows = tile_rows[owner]
    index = TileIndex(
        columns=columns,
        rows=rows,
        row_pointer=None,
        order=None,
        column_pointer=columns.new_zeros(in_features + 1),
    )
    if num_column_groups is None:
        by_feature = columns.flatten().sort(stable=True)
        features = torch.arange(in_features + 1, device=columns.device)
        index = index._replace(
            column_pointer=torch.searchsorted(by_feature.values, features),
            slots=by_feature.indices,
            tile_rows=tile_rows,
        )
        if num_slices is not None:
            from padst_kernels.tiles.cuda import slice_entries

            index = index._replace(slice_entries=slice_entries(columns, in_features, num_slices))
    else:
        place = None
        if column_positions is not None:
            place = _behind(column_positions, num_column_groups * columns.shape[1])
        group = _column_group(columns, place, num_column_groups, in_features)
        pointer, order = _sorted_by(group, num_column_groups)
        index = index._replace(
            transposed_columns=tile_rows[order],
            transposed_rows=place,
            transposed_pointer=pointer,
            transposed_order=order,
        )
    if owner is not None:
        pointer, order = _sorted_by(owner, num_row_groups)
        index = index._replace(columns=columns[order], row_pointer=pointer, order=order)
    # Kernels know no strides.
    return TileIndex._make(None if t is None else t.int().contiguous() for t in index)


def _behind(positions: Tensor, size: int) -> Tensor:
    """`[size]`, the feature at each position, or how many features there are where none is."""
    features = torch.full((size,), len(positions), device=positions.device)
    features[positions] = torch.arange(len(positions), device=positions.device)
    return features


def _groups(
    features: Tensor | None, num_groups: int, size: int, num_features: int, device: torch.device
) -> Tensor:
    """`[num_groups, size]`, the features of each group; `num_features` where none is."""
    if features is None:
        features = torch.arange(num_groups * size, device=device).clamp(max=num_features)
    return features.view(num_groups, size)


def _column_group(
    columns: Tensor, features: Tensor | None, num_groups: int, in_features: int
) -> Tensor:
    """`[G]`, which column group each tile's columns are; `num_groups` for padding alone."""
    width = columns.shape[1]
    groups = _groups(features, num_groups, width, in_features, columns.device)
    group_of = torch.empty(in_features + 1, dtype=torch.int64, device=columns.device)
    group_of[groups] = torch.arange(num_groups, device=columns.device)[:, None]
    group_of[in_features] = num_groups
    group = group_of[columns].amin(1)
    known = torch.cat([groups, groups.new_full((1, width), in_features)])
    if not torch.equal(known[group], columns):
        raise ValueError(
            f"tile_index: the {width} columns of a tile are not one of {num_groups} groups of "
            "column_positions; num_column_groups=None takes any columns"
        )
    return group


def _sorted_by(owner: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Where each group begins among tiles sorted by `owner`, and which tile stands where."""
    owner, order = owner.sort(stable=True)
    groups = torch.arange(num_groups + 1, device=owner.device)
    return torch.searchsorted(owner, groups), order
