"""The product of sparse weights that read one input: which indices it needs, which kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.structures.layout import Layout, scatter_entries
from padst_kernels.fan_in import FanInIndex, fan_in_index, fan_in_product
from padst_kernels.gather_gemm import TileIndex, gather_gemm, tile_index
from padst_kernels.scatter_linear import scatter_linear

Storage = Literal["packed", "masked"]
Backend = Literal["torch", "triton", "dense"]

# What `fold` derives from the topologies; rebuilt after every change, so never saved.
_FAN_IN = tuple(f"fan_in_{name}" for name in FanInIndex._fields)
_DERIVED = ("input_index", "output_index", "mask", "entries", *_FAN_IN, *TileIndex._fields)

__all__ = ["Backend", "Product", "Storage", "alike"]


class Product(nn.Module):
    """y = P_out S P_in x for one weight S, or for several whose outputs are concatenated.

    Packed values multiply without a dense weight: in tiles where the structure has some high enough
    for gathering to pay (`gather_gemm`), else entry by entry (`fan_in_product`, on a CPU). Or they
    go through a dense weight that lives only during a pass (`scatter_linear`). Hard permutations,
    (P x)[i] = x[index[i]], cost nothing: they are folded into the indices of all of them. Masked
    storage is the plain reference.

    Args:
        layouts: of the weights. Several (Q, K and V) must be `alike`; they then run as one.
        storage: of their values.
        backend: what computes packed values, one of `backends`; None for the first of them.
    """

    input_index: Tensor | None
    output_index: Tensor | None
    mask: Tensor | None
    entries: Tensor | None

    def __init__(
        self, layouts: Sequence[Layout], storage: Storage, backend: Backend | None = None
    ) -> None:
        super().__init__()
        self.layouts = list(layouts)
        self.storage = storage
        self.in_features = layouts[0].shape[1]
        self.out_features = sum(layout.shape[0] for layout in layouts)
        self.backend = self.backends(torch.device("cpu"))[0] if backend is None else backend
        for name in _DERIVED:
            self.register_buffer(name, None, persistent=False)

    def backends(self, device: torch.device) -> list[Backend]:
        """What can compute this product on `device`, the usual choice first."""
        if self.storage == "masked":
            return ["dense"]
        if device.type == "cpu":
            return ["torch", "dense"]
        return ["dense"] if self.layouts[0].tile_shape is None else ["torch", "triton", "dense"]

    def fold(
        self,
        units: Sequence[Tensor],
        input_index: Tensor | None,
        output_indices: Sequence[Tensor | None],
    ) -> None:
        """Derive the indices for active units and hard permutations of every weight.

        A new topology changes the tensors in place: compiled code and CUDA graphs stay valid.

        Args:
            units: int64 `[N]` for each weight.
            input_index: int64 `[I]`, or None for the identity.
            output_indices: int64 `[O]`, or None, for each weight.
        """
        output_index = self._concatenate(output_indices)
        if self.storage == "masked":
            self.input_index, self.output_index = input_index, output_index
            entries = self._entries(units)
            kept = torch.ones_like(entries, dtype=torch.bool)
            self._set("mask", scatter_entries(kept, entries, self.shape))
        elif self.backend == "dense":
            entries = self._moved(self._entries(units), input_index, output_index)
            # For single entries the index weighs as much as the values do.
            narrow = self.out_features * self.in_features < 2**31
            self._set("entries", entries.to(torch.int32) if narrow else entries)
        elif self.layouts[0].tile_shape is None:
            entries = self._moved(self._entries(units), input_index, output_index)
            index = fan_in_index(entries, *self.shape, by_row=self._by_row(output_index))
            for name, tensor in index._asdict().items():
                self._set(f"fan_in_{name}", tensor)
        else:
            self._fold_tiles(units, input_index, output_index)

    def forget(self) -> None:
        """Drop what `fold` derived, before a change of `backend`."""
        for name in _DERIVED:
            setattr(self, name, None)

    @property
    def shape(self) -> tuple[int, int]:
        """`(sum of O, I)`."""
        return self.out_features, self.in_features

    def _concatenate(self, output_indices: Sequence[Tensor | None]) -> Tensor | None:
        if all(index is None for index in output_indices):
            return None
        device = next(index.device for index in output_indices if index is not None)
        sizes = [layout.shape[0] for layout in self.layouts]
        starts = accumulate(sizes, initial=0)
        return torch.cat(
            [
                start + (torch.arange(size, device=device) if index is None else index)
                for start, size, index in zip(starts, sizes, output_indices, strict=False)
            ]
        )

    def _entries(self, units: Sequence[Tensor]) -> Tensor:
        """Flat positions of all frames in the concatenated S; sum of O times I where outside."""
        size = self.out_features * self.in_features
        found, start = [], 0
        for layout, active in zip(self.layouts, units, strict=True):
            entries = layout.entries(active)
            outside = entries == layout.shape[0] * layout.shape[1]
            found.append(torch.where(outside, size, entries + start).flatten())
            start += layout.shape[0] * layout.shape[1]
        return torch.cat(found)

    def _moved(
        self, entries: Tensor, input_index: Tensor | None, output_index: Tensor | None
    ) -> Tensor:
        """Cell (r, c) of S stands at (inverse(output_index)[r], input_index[c])."""
        num_rows, num_columns = self.shape
        rows, columns = entries // num_columns, entries % num_columns
        if input_index is not None:
            columns = input_index[columns]
        if output_index is not None:
            rows = output_index.argsort()[rows.clamp(max=num_rows - 1)]
        outside = entries == num_rows * num_columns
        return torch.where(outside, entries, rows * num_columns + columns)

    def _by_row(self, output_index: Tensor | None) -> bool:
        """Whether single entries come row by row, whatever the topology."""
        return output_index is None and all(layout.by_row for layout in self.layouts)

    def _fold_tiles(
        self, units: Sequence[Tensor], input_index: Tensor | None, output_index: Tensor | None
    ) -> None:
        height = self.layouts[0].frame[2]
        columns, owners, positions = [], [], []
        one_per_group, num_groups = True, 0
        for layout, active in zip(self.layouts, units, strict=True):
            tiles = layout.tiles(active)
            assert tiles is not None
            merged, groups = layout.merged_tiles, layout.num_row_groups
            # A tile that reaches over the edge reads zeros there.
            inside = tiles[0].clamp(max=self.in_features)
            columns.append(inside.reshape(len(inside) // merged, -1))
            owners.append(tiles[1][::merged] + num_groups)
            rows = layout.row_positions()
            rows = torch.arange(layout.shape[0]) if rows is None else rows
            positions.append(rows.to(active.device) + num_groups * height)
            # Tiles merge where each group has one; then they stand in the order of the groups.
            one_per_group &= len(columns[-1]) == groups and (merged > 1 or len(active) == 1)
            num_groups += groups
        places = (
            torch.cat(positions) if output_index is None else torch.cat(positions)[output_index]
        )
        inputs = torch.cat(columns)
        if input_index is not None:
            beyond = input_index.new_tensor([self.in_features])
            inputs = torch.cat([input_index, beyond])[inputs]
        index = tile_index(
            inputs,
            None if one_per_group else torch.cat(owners),
            None if output_index is None and self._in_order() else places,
            height=height,
            num_row_groups=num_groups,
            in_features=self.in_features,
            out_features=self.out_features,
            num_column_groups=self.layouts[0].num_column_groups,
            column_positions=self._column_positions(input_index, inputs.device),
        )
        for name, tensor in index._asdict().items():
            self._set(name, tensor)

    def _column_positions(self, input_index: Tensor | None, device: torch.device) -> Tensor | None:
        """Where each feature of x stands among the column groups of the first, so of every, S."""
        if self.layouts[0].num_column_groups is None:
            return None
        positions = self.layouts[0].column_positions()
        if positions is None and input_index is None:
            return None
        positions = torch.arange(self.in_features) if positions is None else positions
        positions = positions.to(device)
        if input_index is None:
            return positions
        return torch.empty_like(positions).index_copy_(0, input_index, positions)

    def _in_order(self) -> bool:
        """Whether rows of y follow each other as the rows of all row groups do."""
        height = self.layouts[0].frame[2]
        whole = all(layout.shape[0] % height == 0 for layout in self.layouts[:-1])
        return whole and all(layout.row_positions() is None for layout in self.layouts)

    def _set(self, name: str, new: Tensor | None) -> None:
        old = getattr(self, name)
        if old is None or new is None or (old.shape, old.device) != (new.shape, new.device):
            setattr(self, name, new)
        else:
            old.copy_(new)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """`[..., I]` and values of each S, packed `[N, E]` or masked `[O, I]`, to `[..., O]`."""
        if self.mask is not None:
            x = x if self.input_index is None else x[..., self.input_index]
            y = nn.functional.linear(x, _join(values) * self.mask)
            return y if self.output_index is None else y[..., self.output_index]
        if self.entries is not None:
            flat = _join([value.flatten() for value in values])
            return scatter_linear(x, flat, self.entries, self.out_features)
        tile_shape = self.layouts[0].tile_shape
        if tile_shape is None:
            entries = FanInIndex(*(getattr(self, name) for name in _FAN_IN))
            flat = _join([value.flatten() for value in values])
            return fan_in_product(x, flat, entries, self.out_features)
        tiles = _join([value.reshape(-1, *tile_shape) for value in values])
        index = TileIndex(*(getattr(self, name) for name in TileIndex._fields))
        assert index.columns is not None, "fold was never called"
        backend: Literal["torch", "triton"] = "triton" if self.backend == "triton" else "torch"
        return gather_gemm(x, tiles, index, self.out_features, backend=backend)


def alike(layouts: Sequence[Layout], storage: Storage) -> bool:
    """Whether one `Product` can compute all of `layouts`: their tiles have one shape, or none."""
    return storage == "masked" or len({layout.tile_shape for layout in layouts}) == 1


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
