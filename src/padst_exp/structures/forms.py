"""The ways to compute a product of sparse weights; `Product` has one of them at a time."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from padst_exp.structures.folding import (
    joined_entries,
    joined_output,
    permuted_entries,
    permuted_tiles,
)
from padst_exp.structures.layout import Layout, scatter_entries
from padst_kernels import Backend
from padst_kernels.diagonals import diagonal_matmul
from padst_kernels.entries import EntryIndex, entry_index, entry_matmul
from padst_kernels.scatter import scatter_matmul
from padst_kernels.tiles import TileIndex, tile_matmul
from padst_kernels.tiles.cuda import slices_on


class Form(nn.Module, abc.ABC):
    """One way to compute P_out S P_in x.

    What `fold` derives from the topologies is rebuilt after every change, so it is never saved.

    Args:
        layouts: of the weights; the outputs of several are concatenated.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        super().__init__()
        self.layouts = list(layouts)
        self.out_features = sum(layout.shape[0] for layout in layouts)

    @abc.abstractmethod
    def fold(
        self,
        units: Sequence[Tensor],
        input_index: Tensor | None,
        output_indices: Sequence[Tensor | None],
    ) -> None:
        """Derive the indices; arguments as in folding.py."""

    @abc.abstractmethod
    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        """`[..., I]` and values of each S, packed `[N, E]` or masked `[O, I]`, to `[..., O]`."""

    def _set(self, name: str, new: Tensor | None) -> None:
        """Keep a derived tensor; in place, so that compiled code and CUDA graphs stay valid."""
        old = getattr(self, name, None)
        if old is None or new is None or (old.shape, old.device) != (new.shape, new.device):
            self.register_buffer(name, new, persistent=False)
        else:
            old.copy_(new)


class Masked(Form):
    """A dense weight times a mask: the plain reference, for masked storage."""

    mask: Tensor
    input_index: Tensor | None
    output_index: Tensor | None

    def fold(
        self,
        units: Sequence[Tensor],
        input_index: Tensor | None,
        output_indices: Sequence[Tensor | None],
    ) -> None:
        entries = joined_entries(self.layouts, units)
        shape = self.out_features, self.layouts[0].shape[1]
        kept = torch.ones_like(entries, dtype=torch.bool)
        self._set("mask", scatter_entries(kept, entries, shape))
        # The permutation's own tensor must not be written to.
        self.register_buffer("input_index", input_index, persistent=False)
        self._set("output_index", joined_output(self.layouts, output_indices))

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        x = x if self.input_index is None else x[..., self.input_index]
        y = nn.functional.linear(x, _join(values) * self.mask)
        return y if self.output_index is None else y[..., self.output_index]


class ThroughDense(Form):
    """A dense weight that lives only during a pass."""

    entries: Tensor

    def fold(
        self,
        units: Sequence[Tensor],
        input_index: Tensor | None,
        output_indices: Sequence[Tensor | None],
    ) -> None:
        entries = permuted_entries(self.layouts, units, input_index, output_indices)
        # For single entries the index weighs as much as the values do.
        narrow = self.out_features * self.layouts[0].shape[1] < 2**31
        self._set("entries", entries.int() if narrow else entries)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        flat = _join([value.flatten() for value in values])
        return scatter_matmul(x, flat, self.entries, self.out_features)


class Tiles(Form):
    """Dense tiles whose rows share gathered inputs."""

    def __init__(self, layouts: Sequence[Layout], backend: Backend) -> None:
        super().__init__(layouts)
        tile_shape = layouts[0].tile_shape
        assert tile_shape is not None
        self.tiles_shape = (-1, *tile_shape)
        self.backend: Backend = backend

    def fold(
        self,
        units: Sequence[Tensor],
        input_index: Tensor | None,
        output_indices: Sequence[Tensor | None],
    ) -> None:
        num_slices = None
        if self.backend == "cuda":
            in_features, height = self.layouts[0].shape[1], self.layouts[0].frame[2]
            num_slices = slices_on(units[0].device, in_features, height)
        index = permuted_tiles(
            self.layouts, units, input_index, output_indices, num_slices=num_slices
        )
        for name, tensor in index._asdict().items():
            self._set(name, tensor)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        tiles = _join([value.view(self.tiles_shape) for value in values])
        # Attributes of a module are found slowly; with few tokens that shows.
        buffers = self._buffers
        index = TileIndex._make([buffers[name] for name in TileIndex._fields])
        backend = "native" if x.is_cpu and self.backend == "torch" else self.backend
        return tile_matmul(x, tiles, index, self.out_features, backend=backend)


class Entries(Form):
    """Entry by entry, each row with inputs of its own."""

    def fold(
        self,
        units: Sequence[Tensor],
        input_index: Tensor | None,
        output_indices: Sequence[Tensor | None],
    ) -> None:
        entries = permuted_entries(self.layouts, units, input_index, output_indices)
        in_order = all(index is None for index in output_indices)
        by_row = in_order and all(layout.by_row for layout in self.layouts)
        in_features = self.layouts[0].shape[1]
        index = entry_index(entries, self.out_features, in_features, by_row=by_row)
        for name, tensor in index._asdict().items():
            self._set(name, tensor)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        buffers = self._buffers
        index = EntryIndex._make([buffers[name] for name in EntryIndex._fields])
        flat = _join([value.flatten() for value in values])
        backend: Backend = "native" if x.is_cpu else "torch"
        return entry_matmul(x, flat, index, self.out_features, backend=backend)


class Diagonals(Form):
    """Single diagonals, one weight after the other, by the Triton kernel."""

    offsets: Tensor
    columns: Tensor | None
    rows: Tensor | None

    def fold(
        self,
        units: Sequence[Tensor],
        input_index: Tensor | None,
        output_indices: Sequence[Tensor | None],
    ) -> None:
        offsets = [
            layout.offsets(active) for layout, active in zip(self.layouts, units, strict=True)
        ]
        self._set("offsets", torch.cat([part for part in offsets if part is not None]).int())
        self._set("columns", None if input_index is None else input_index.int())
        output_index = joined_output(self.layouts, output_indices)
        rows = None
        if output_index is not None:
            parts = output_index.split([layout.shape[0] for layout in self.layouts])
            rows = torch.cat([part.argsort() for part in parts]).int()
        self._set("rows", rows)

    def forward(self, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        heights = [layout.shape[0] for layout in self.layouts]
        offsets = self.offsets.split([layout.num_active for layout in self.layouts])
        rows = [None] * len(heights) if self.rows is None else self.rows.split(heights)
        parts = [
            diagonal_matmul(x, value, at, height, columns=self.columns, rows=to, backend="triton")
            for value, at, height, to in zip(values, offsets, heights, rows, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
