"""Linear layers of a trained sparse model: packed weights, permutations folded in, no gradients.

Shape letters: I and O features in and out, G tiles, K columns and V rows of a tile, R row groups,
S single entries, N rows that have entries.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from padst_kernels.entries import Condensed, condense, condensed_matmul
from padst_kernels.tiles import TileIndex, tile_matmul


class PackedLinear(nn.Module, abc.ABC):
    """y = W x + b, for inference: x `[..., I]` to `[..., O]`, in the dtype of W or of autocast.

    Weights are parameters that need no gradient, so that `to` moves and casts them.

    Attributes:
        backend: of the kernel that multiplies.

    Raises:
        ValueError: x requires a gradient while gradients are on.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, in_features: int, out_features: int
    ) -> None:
        super().__init__()
        self.backend: Literal["torch", "triton"] = "torch"
        self.in_features, self.out_features = in_features, out_features
        self.weight = _constant(weight)
        self.register_parameter("bias", None if bias is None else _constant(bias))

    @abc.abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """W x, with the values `weight` of W in the dtype of x."""

    @abc.abstractmethod
    def dense_weight(self) -> Tensor:
        """W as a dense `[O, I]` matrix."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise a ValueError where an index names a feature that does not exist."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._forward(x)
        if x.requires_grad:
            raise ValueError("x requires a gradient, but an exported layer is for inference only")
        with torch.no_grad():
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        # Attributes of a module are found slowly; with few tokens that shows.
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        y = self.product(x.to(dtype), weight.to(dtype))
        # In place: y is ours, and a second one of its size costs more than the sum.
        return y if bias is None else y.add_(bias.to(dtype))

    def dense(self) -> nn.Linear:
        """The same layer with a dense weight."""
        return dense_linear(self.dense_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class TiledLinear(PackedLinear):
    """A weight of dense tiles, multiplied by `tile_matmul`.

    Args:
        weight: `[G, K, V]`, the tiles.
        index: made by `tile_index` for these tiles; only what the forward pass reads is kept.
        out_features: O.
        bias: `[O]`, or None.
    """

    columns: Tensor
    rows: Tensor | None
    row_pointer: Tensor | None
    column_groups: Tensor | None
    column_pointer: Tensor

    def __init__(
        self, weight: Tensor, index: TileIndex, out_features: int, bias: Tensor | None
    ) -> None:
        tiles = weight if index.order is None else weight.index_select(0, index.order)
        super().__init__(tiles, bias, index.in_features, out_features)
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
        buffers: dict[str, Any] = self._buffers
        return TileIndex(
            columns=buffers["columns"],
            rows=buffers["rows"],
            row_pointer=buffers["row_pointer"],
            order=None,
            column_pointer=buffers["column_pointer"],
            transposed_pointer=buffers["column_groups"],
        )

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        backend = "native" if x.is_cpu and self.backend == "torch" else self.backend
        return tile_matmul(x, weight, self.index(), self.out_features, backend=backend)

    def scaled_weight(self, columns: Tensor | None, rows: Tensor | None) -> Tensor:
        """The tiles of the weight W[o, i] * columns[i] * rows[o]; None scales nothing."""
        weight = self.weight
        if columns is not None:
            weight = weight * nn.functional.pad(columns, (0, 1))[self.columns.long()][:, :, None]
        if rows is not None:
            weight = weight * nn.functional.pad(rows, (0, 1))[self._tile_rows()][:, None, :]
        return weight

    def dense_weight(self) -> Tensor:
        rows = self._tile_rows()[:, None, :]
        columns = self.columns.long()[:, :, None]
        # Padding goes to a row and a column beyond the matrix.
        dense = self.weight.new_zeros(self.out_features + 1, self.in_features + 1)
        dense[torch.broadcast_tensors(rows, columns)] = self.weight
        return dense[:-1, :-1].contiguous()

    def _tile_rows(self) -> Tensor:
        """Int64 `[G, V]`, feature of y behind each row of a tile, O where none is."""
        num_tiles, _, height = self.weight.shape
        owner = torch.arange(num_tiles, device=self.weight.device)
        if self.row_pointer is not None:
            owner = torch.searchsorted(self.row_pointer[1:].long(), owner, right=True)
        positions = owner[:, None] * height + torch.arange(height, device=owner.device)
        if self.rows is None:
            return positions.clamp(max=self.out_features)
        return self.rows.long()[positions]

    def check(self) -> None:
        _require_within("columns", self.columns, self.in_features)
        num_groups = len(self.weight)
        if self.row_pointer is not None:
            _require_pointer("row_pointer", self.row_pointer, len(self.weight))
            num_groups = len(self.row_pointer) - 1
        num_rows = num_groups * self.weight.shape[2]
        if self.columns.shape != self.weight.shape[:2]:
            raise ValueError(f"columns is {tuple(self.columns.shape)}")
        if self.rows is None:
            if num_rows < self.out_features:
                raise ValueError(f"{num_rows} rows do not make {self.out_features} features")
            return
        if self.rows.shape != (num_rows,):
            raise ValueError(f"rows is {tuple(self.rows.shape)}")
        _require_within("rows", self.rows, self.out_features)
        # Every feature of y is written, by one row.
        counts = torch.bincount(self.rows, minlength=self.out_features + 1)[: self.out_features]
        if not bool((counts == 1).all()):
            raise ValueError("rows do not name every feature once")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe_tiles(self.weight, self.index(), self.backend)}"


class CondensedLinear(PackedLinear):
    """A weight of single entries, multiplied by `condensed_matmul`.

    Rows without entries (ablated neurons) take no storage and no time.

    Args:
        weight: made by `condense`.
        bias: `[O]`, or None.
    """

    columns: Tensor
    row_pointer: Tensor
    rows: Tensor

    def __init__(self, weight: Condensed, bias: Tensor | None) -> None:
        super().__init__(weight.values, bias, weight.in_features, weight.out_features)
        self.register_buffer("columns", weight.columns)
        self.register_buffer("row_pointer", weight.row_pointer)
        self.register_buffer("rows", weight.rows)

    @classmethod
    def from_dense(cls, dense: Tensor, bias: Tensor | None) -> CondensedLinear:
        """Condense what is not zero in `dense` `[O, I]`."""
        entries = dense.flatten().nonzero().squeeze(1)
        return cls(condense(dense.flatten()[entries], entries, *dense.shape), bias)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        buffers: dict[str, Any] = self._buffers
        index = buffers["columns"], buffers["row_pointer"], buffers["rows"]
        condensed = Condensed(weight, *index, self.in_features, self.out_features)
        backend = "native" if x.is_cpu and self.backend == "torch" else self.backend
        return condensed_matmul(x, condensed, backend=backend)

    def dense_weight(self) -> Tensor:
        rows = self.rows.long().repeat_interleave(self.row_pointer.diff().long())
        dense = self.weight.new_zeros(self.out_features, self.in_features)
        dense[rows, self.columns.long()] = self.weight
        return dense

    def check(self) -> None:
        _require_within("columns", self.columns.int(), self.in_features - 1)
        _require_within("rows", self.rows, self.out_features - 1)
        _require_pointer("row_pointer", self.row_pointer, len(self.weight))
        if self.columns.shape != self.weight.shape or len(self.rows) + 1 != len(self.row_pointer):
            raise ValueError(f"columns is {tuple(self.columns.shape)}")
        if not bool((self.rows.diff() > 0).all()):
            raise ValueError("rows do not ascend")

    def extra_repr(self) -> str:
        own = f"entries={len(self.weight)}, rows={len(self.rows)}, backend={self.backend}"
        return f"{super().extra_repr()}, {own}"


class ConcatenatedLinear(nn.Module):
    """Projections of one input whose weights are too different to run as one product.

    Args:
        parts: map x `[..., I]` to parts of y, concatenated to `[..., O]`.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def describe_tiles(weight: Tensor, index: TileIndex, backend: str) -> str:
    """All that the speed of a product of tiles depends on, but for its input."""
    return (
        f"tiles={tuple(weight.shape)}, "
        f"column_run={index.column_run}, permuted_rows={index.rows is not None}, backend={backend}"
    )


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of `weight` `[O, I]` and `bias` `[O]`, no gradients."""
    rows, columns = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(columns, rows, bias=bias is not None)
    linear.weight = _constant(weight)
    if bias is not None:
        linear.bias = _constant(bias)
    return linear.eval()


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def _require_within(name: str, index: Tensor, largest: int) -> None:
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) <= largest):
        raise ValueError(f"{name} has features beyond {largest}")


def _require_pointer(name: str, pointer: Tensor, end: int) -> None:
    ascends = bool((pointer.diff() >= 0).all())
    if not len(pointer) or int(pointer[0]) != 0 or int(pointer[-1]) != end or not ascends:
        raise ValueError(f"{name} does not lead from 0 to {end}")
