"""Sparse matrices of a trained model: values that need no gradient, and where they stand.

Shape letters: I and O features in and out, G tiles, K columns and V rows of a tile, R row groups,
S single entries, N rows that have entries.
"""

from __future__ import annotations

import abc
import copy
from typing import Any

import torch
from torch import Tensor, nn

from padst_kernels import Backend
from padst_kernels.entries import Condensed, condensed_matmul
from padst_kernels.tiles import TileIndex, tile_matmul


class PackedWeight(nn.Module, abc.ABC):
    """A matrix W `[O, I]` that is mostly zero; permutations are folded in.

    Attributes:
        values: a parameter without gradient, so that `to` moves and casts it.
    """

    values: Tensor

    def __init__(self, values: Tensor, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.values = constant(values)

    @abc.abstractmethod
    def product(self, x: Tensor, backend: Backend) -> Tensor:
        """W x of `[..., I]`, in the dtype of x."""

    @abc.abstractmethod
    def matrix(self) -> Tensor:
        """W, dense, `[O, I]`."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise a ValueError unless kernels may multiply by it: they check nothing."""


class PackedTiles(PackedWeight):
    """Dense tiles, multiplied by `tile_matmul`.

    Args:
        values: `[G, K, V]`, the tiles.
        index: made by `tile_index` for these tiles; only what the forward pass reads is kept.
        out_features: O.
    """

    columns: Tensor
    rows: Tensor | None
    row_pointer: Tensor | None
    column_groups: Tensor | None
    column_pointer: Tensor

    def __init__(self, values: Tensor, index: TileIndex, out_features: int) -> None:
        tiles = values if index.order is None else values.index_select(0, index.order)
        super().__init__(tiles, index.in_features, out_features)
        self.register_buffer("columns", index.columns)
        self.register_buffer("rows", index.rows)
        self.register_buffer("row_pointer", index.row_pointer)
        # Its presence says that columns come in runs, which are read at once.
        natural = index.column_run > 1
        self.register_buffer("column_groups", index.transposed_pointer if natural else None)
        # Of this one the forward pass reads nothing but the size.
        self.register_buffer(
            "column_pointer", torch.zeros_like(index.column_pointer), persistent=False
        )

    def index(self) -> TileIndex:
        """What `tile_matmul` needs for a forward pass."""
        # Attributes of a module are found slowly; with few tokens that shows.
        buffers: dict[str, Any] = self._buffers
        return TileIndex(
            columns=buffers["columns"],
            rows=buffers["rows"],
            row_pointer=buffers["row_pointer"],
            order=None,
            column_pointer=buffers["column_pointer"],
            transposed_pointer=buffers["column_groups"],
        )

    def product(self, x: Tensor, backend: Backend) -> Tensor:
        values: Any = self._parameters["values"]
        index, out_features = self.index(), self.out_features
        values = values.to(x.dtype)
        return tile_matmul(x, values, index, out_features, backend=backend, trusted=True)

    def scaled(self, columns: Tensor | None, rows: Tensor | None) -> PackedTiles:
        """The same for W[o, i] * columns[i] * rows[o]; None scales nothing."""
        values, scaled = self.values, copy.copy(self)
        if columns is not None:
            values = values * nn.functional.pad(columns, (0, 1))[self.columns.long()][:, :, None]
        if rows is not None:
            values = values * nn.functional.pad(rows, (0, 1))[self._tile_rows()][:, None, :]
        scaled._parameters = {"values": constant(values.to(self.values.dtype))}
        return scaled

    def matrix(self) -> Tensor:
        rows = self._tile_rows()[:, None, :]
        columns = self.columns.long()[:, :, None]
        # Padding goes to a row and a column beyond the matrix.
        dense = self.values.new_zeros(self.out_features + 1, self.in_features + 1)
        dense[torch.broadcast_tensors(rows, columns)] = self.values
        return dense[:-1, :-1].contiguous()

    def _tile_rows(self) -> Tensor:
        """Int64 `[G, V]`, feature of y behind each row of a tile, O where none is."""
        num_tiles, _, height = self.values.shape
        owner = torch.arange(num_tiles, device=self.values.device)
        if self.row_pointer is not None:
            owner = torch.searchsorted(self.row_pointer[1:].long(), owner, right=True)
        positions = owner[:, None] * height + torch.arange(height, device=owner.device)
        if self.rows is None:
            return positions.clamp(max=self.out_features)
        return self.rows.long()[positions]

    def check(self) -> None:
        _require_kind("values", self.values, None, 3)
        _require_kind("columns", self.columns, torch.int32, 2)
        num_tiles, width, height = self.values.shape
        if self.columns.shape != (num_tiles, width) or (num_tiles and not width * height):
            raise ValueError(f"columns is {tuple(self.columns.shape)}")
        _require_within("columns", self.columns, self.in_features)
        if self.column_groups is not None:
            _require_kind("column_groups", self.column_groups, torch.int32, 1)
            self._check_runs()
        num_groups = num_tiles
        if self.row_pointer is not None:
            _require_kind("row_pointer", self.row_pointer, torch.int32, 1)
            _require_pointer("row_pointer", self.row_pointer, num_tiles)
            num_groups = len(self.row_pointer) - 1
        self._check_distinct()
        num_rows = num_groups * height
        if self.rows is None:
            if num_rows < self.out_features:
                raise ValueError(f"{num_rows} rows do not make {self.out_features} features")
            return
        _require_kind("rows", self.rows, torch.int32, 1)
        if self.rows.shape != (num_rows,):
            raise ValueError(f"rows is {tuple(self.rows.shape)}")
        _require_within("rows", self.rows, self.out_features)
        # Every feature of y is written, by one row.
        counts = torch.bincount(self.rows, minlength=self.out_features + 1)[: self.out_features]
        if not bool((counts == 1).all()):
            raise ValueError("rows do not name every feature once")

    def _check_distinct(self) -> None:
        """No row group may read a feature twice; padding it may."""
        owner = torch.arange(len(self.columns), device=self.columns.device)
        if self.row_pointer is not None:
            owner = torch.searchsorted(self.row_pointer[1:].long(), owner, right=True)
        owner, columns = owner.repeat_interleave(self.columns.shape[1]), self.columns.flatten()
        inside = columns < self.in_features
        read = (owner * self.in_features + columns)[inside].sort().values
        if not bool((read.diff() > 0).all()):
            raise ValueError("columns name a feature twice in one row")

    def _check_runs(self) -> None:
        """Kernels read the columns of a tile at once where `column_groups` says they may."""
        width = self.columns.shape[1]
        first, steps = self.columns[:, 0], torch.arange(width, device=self.columns.device)
        runs = (first[:, None] + steps).clamp(max=self.in_features)
        aligned = (first % width == 0) | (first == self.in_features)
        if not (torch.equal(runs, self.columns.long()) and bool(aligned.all())):
            raise ValueError("columns are no runs, though there are column_groups")

    def extra_repr(self) -> str:
        """All that the speed of the product depends on, but for its input and its backend."""
        permuted, run = self.rows is not None, self.index().column_run
        return f"tiles={tuple(self.values.shape)}, run={run}, permuted_rows={permuted}"


class PackedEntries(PackedWeight):
    """Single entries, multiplied by `condensed_matmul`.

    Rows without entries (ablated neurons) take no storage and no time.

    Args:
        weight: made by `condense`.
    """

    columns: Tensor
    row_pointer: Tensor
    rows: Tensor

    def __init__(self, weight: Condensed) -> None:
        super().__init__(weight.values, weight.in_features, weight.out_features)
        self.narrow = weight.columns.dtype == torch.uint16
        self.register_buffer("columns", self._kept(weight.columns))
        self.register_buffer("row_pointer", weight.row_pointer)
        self.register_buffer("rows", weight.rows)

    def _kept(self, columns: Tensor) -> Tensor:
        # As bytes: gloo, which broadcasts buffers, knows no integers of two. Files have these.
        return columns.view(torch.uint8) if columns.dtype == torch.uint16 else columns

    def features(self) -> Tensor:
        """The input of each entry, `[S]`, uint16 where I allows it, else int32."""
        columns: Any = self._buffers["columns"]
        return columns.view(torch.uint16) if self.narrow else columns

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}columns"] = self.features()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        columns = state_dict.get(f"{prefix}columns")
        if isinstance(columns, Tensor):
            state_dict = {**state_dict, f"{prefix}columns": self._kept(columns)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def product(self, x: Tensor, backend: Backend) -> Tensor:
        own: dict[str, Any] = {**self._parameters, **self._buffers}
        index = self.features(), own["row_pointer"], own["rows"]
        values = own["values"].to(x.dtype)
        condensed = Condensed(values, *index, self.in_features, self.out_features)
        return condensed_matmul(x, condensed, backend=backend, trusted=True)

    def matrix(self) -> Tensor:
        rows = self.rows.long().repeat_interleave(self.row_pointer.diff().long())
        dense = self.values.new_zeros(self.out_features, self.in_features)
        dense[rows, self.features().long()] = self.values
        return dense

    def check(self) -> None:
        narrow = torch.uint16 if self.in_features <= 1 << 16 else torch.int32
        columns = self.features()
        _require_kind("values", self.values, None, 1)
        _require_kind("columns", columns, narrow, 1)
        _require_kind("row_pointer", self.row_pointer, torch.int32, 1)
        _require_kind("rows", self.rows, torch.int32, 1)
        _require_within("columns", columns.int(), self.in_features - 1)
        _require_within("rows", self.rows, self.out_features - 1)
        _require_pointer("row_pointer", self.row_pointer, len(self.values))
        if columns.shape != self.values.shape or len(self.rows) + 1 != len(self.row_pointer):
            raise ValueError(f"columns is {tuple(columns.shape)}")
        if not bool((self.rows.diff() > 0).all()):
            raise ValueError("rows do not ascend")
        owner = self.rows.long().repeat_interleave(self.row_pointer.diff().long())
        if not bool((owner * self.in_features + columns.int()).diff().gt(0).all()):
            raise ValueError("columns do not ascend along a row")

    def extra_repr(self) -> str:
        return f"entries={len(self.values)}, rows={len(self.rows)}"


def constant(tensor: Tensor) -> nn.Parameter:
    """A parameter that needs no gradient."""
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def _require_kind(name: str, tensor: Tensor, dtype: torch.dtype | None, dim: int) -> None:
    """Require a dtype (None: any of floating point) and a number of dimensions."""
    right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if not right or tensor.dim() != dim:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")


def _require_within(name: str, index: Tensor, largest: int) -> None:
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) <= largest):
        raise ValueError(f"{name} has features beyond {largest}")


def _require_pointer(name: str, pointer: Tensor, end: int) -> None:
    ascends = bool((pointer.diff() >= 0).all())
    if not len(pointer) or int(pointer[0]) != 0 or int(pointer[-1]) != end or not ascends:
        raise ValueError(f"{name} does not lead from 0 to {end}")
