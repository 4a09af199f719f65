"""The product of one sparse weight: which indices it needs, and which kernel computes it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.structures.layout import Layout, scatter_entries
from padst_kernels.gather_gemm import TileIndex, gather_gemm, tile_index, use_backend
from padst_kernels.scatter_linear import scatter_linear

Storage = Literal["packed", "masked"]

__all__ = ["Product", "Storage", "use_backend"]

# What `fold` derives from a topology; rebuilt after every change, so never saved.
_DERIVED = ("input_index", "output_index", "mask", "entries", *TileIndex._fields)


class Product(nn.Module):
    """y = P_out S P_in x, with (P x)[i] = x[index[i]], from the values of S.

    Packed values multiply without a dense weight where the structure has tiles high enough for
    gathering to pay (`gather_gemm`); single entries go through a dense weight that lives only
    during a pass (`scatter_linear`). Hard permutations cost nothing: they are folded into the
    indices of either. Masked storage is the plain reference for both.
    """

    input_index: Tensor | None
    output_index: Tensor | None
    mask: Tensor | None
    entries: Tensor | None

    def __init__(self, layout: Layout, storage: Storage) -> None:
        super().__init__()
        self.layout = layout
        self.storage = storage
        for name in _DERIVED:
            self.register_buffer(name, None, persistent=False)

    def fold(self, units: Tensor, input_index: Tensor | None, output_index: Tensor | None) -> None:
        """Derive the indices for active `units` `[N]` and hard permutations `[I]` and `[O]`.

        A new topology changes the tensors in place: compiled code and CUDA graphs stay valid.
        """
        self.input_index, self.output_index = input_index, output_index
        tiles = self.layout.tiles(units)
        if self.storage == "masked":
            entries = self.layout.entries(units)
            kept = torch.ones_like(entries, dtype=torch.bool)
            self._set("mask", scatter_entries(kept, entries, self.layout.shape))
        elif tiles is None:
            self._fold_entries(units)
        else:
            self._fold_tiles(units, *tiles)

    def _fold_entries(self, units: Tensor) -> None:
        """Cell (r, c) of S stands at (inverse(output_index)[r], input_index[c])."""
        num_rows, num_columns = self.layout.shape
        entries = self.layout.entries(units)
        rows, columns = entries // num_columns, entries % num_columns
        if self.input_index is not None:
            columns = self.input_index[columns]
        if self.output_index is not None:
            rows = self.output_index.argsort()[rows.clamp(max=num_rows - 1)]
        outside = entries == num_rows * num_columns
        entries = torch.where(outside, entries, rows * num_columns + columns)
        # For single entries the index weighs as much as the values do.
        narrow = num_rows * num_columns < 2**31
        self._set("entries", entries.to(torch.int32) if narrow else entries)

    def _fold_tiles(self, units: Tensor, columns: Tensor, owner: Tensor) -> None:
        layout, merged = self.layout, self.layout.merged_tiles
        num_rows, num_columns = layout.shape
        # A tile that reaches over the edge reads zeros there.
        columns = columns.clamp(max=num_columns).reshape(len(columns) // merged, -1)
        if self.input_index is not None:
            beyond = self.input_index.new_tensor([num_columns])
            columns = torch.cat([self.input_index, beyond])[columns]
        positions = layout.row_positions()
        if positions is not None:
            positions = positions.to(owner.device)
        if self.output_index is not None:
            positions = self.output_index if positions is None else positions[self.output_index]
        # Tiles merge where each row group has one; then they stand in the order of the groups.
        one_per_group = len(columns) == layout.num_row_groups and (merged > 1 or len(units) == 1)
        index = tile_index(
            columns,
            None if one_per_group else owner[::merged],
            positions,
            height=layout.frame[2],
            num_row_groups=layout.num_row_groups,
            in_features=num_columns,
            out_features=num_rows,
        )
        for name, tensor in index._asdict().items():
            self._set(name, tensor)

    def _set(self, name: str, new: Tensor | None) -> None:
        old = getattr(self, name)
        if old is None or new is None or (old.shape, old.device) != (new.shape, new.device):
            setattr(self, name, new)
        else:
            old.copy_(new)

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """`[..., I]` and the values of S, `[N, E]` packed or `[O, I]` masked, to `[..., O]`."""
        out_features = self.layout.shape[0]
        if self.mask is not None:
            x = x if self.input_index is None else x[..., self.input_index]
            y = nn.functional.linear(x, values * self.mask)
            return y if self.output_index is None else y[..., self.output_index]
        if self.entries is not None:
            return scatter_linear(x, values, self.entries, out_features)
        index = TileIndex(*(getattr(self, name) for name in TileIndex._fields))
        assert index.columns is not None, "fold was never called"
        tiles = values.reshape(*index.columns.shape, self.layout.frame[2])
        return gather_gemm(x, tiles, index, out_features)
