"""y = W x for a weight in dense tiles whose rows share gathered inputs, differentiable.

Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile,
R row groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from padst_kernels.activations import empty_features
from padst_kernels.backends import Backend
from padst_kernels.calls import is_recorded, operator
from padst_kernels.checks import Part, require_index
from padst_kernels.devices import shared
from padst_kernels.tiles import passes
from padst_kernels.tiles.index import TileIndex

BACKENDS = ("native", "torch", "triton", "cuda")


def tile_matmul(
    x: Tensor,
    weight: Tensor,
    index: TileIndex,
    out_features: int,
    *,
    backend: Backend = "torch",
    trusted: bool = False,
) -> Tensor:
    """y[..., o] = sum over tiles g of o's row group of weight[g, :, v] . x[..., columns[g]].

    Permutations fold into `index`, on the input and on the output side, at no cost.

    Args:
        x: floating point `[..., I]`.
        weight: `[G, K, V]`, dtype of x.
        index: int32, made by `tile_index`.
        out_features: O.
        backend: `"native"`: the compiled kernel, for tensors on a CPU. `"torch"`: plain PyTorch.
            `"triton"`: the Triton kernels, for tensors on a GPU. `"cuda"`: the same, but for dX of
            vector N:M in half precision where the index has slices. float64, and machines without
            a compiler, go to `"torch"` all the same.
        trusted: `index` is as `tile_index` made it, so that no call looks at its numbers.

    Returns:
        `[..., O]`, dtype of x. Differentiable in `x` and `weight`, once and in reverse mode.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or there is no such backend for `x`.
        IndexError: a number in `index` is out of range.
    """
    check("tile_matmul", x, x.shape[-1], weight, index, out_features, backend, trusted)
    # Of few tokens a view takes longer than the product.
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = product(
        flat, weight, None, None, index, None, None, None, None,
        out_features, False, False, False, backend,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def check(
    name: str,
    x: Tensor,
    num_features: int,
    weight: Tensor,
    index: TileIndex,
    out_features: int,
    backend: str,
    trusted: bool,
) -> None:
    """Raise a ValueError where the arguments of an operation `name` disagree.

    Unless `trusted`, an IndexError where a number in `index` is out of range.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend is {backend!r}, expected one of {BACKENDS}")
    columns, pointer = index.columns, index.row_pointer
    num_tiles, width, height = weight.shape
    if columns.shape != (num_tiles, width):
        raise ValueError(
            f"{name}: columns is {tuple(columns.shape)}, expected the first two sizes of "
            f"weight {tuple(weight.shape)}"
        )
    num_rows = (num_tiles if pointer is None else pointer.shape[0] - 1) * height
    if out_features > num_rows:
        raise ValueError(f"{name}: out_features is {out_features}, the index has {num_rows} rows")
    if num_features != index.in_features:
        raise ValueError(f"{name}: x is {tuple(x.shape)}, expected {index.in_features} features")
    if x.dtype != weight.dtype:
        raise ValueError(f"{name}: x is {x.dtype}, expected the dtype of weight {weight.dtype}")
    if not x.device == weight.device == columns.device:
        raise ValueError(
            f"{name}: x is on {x.device}, weight on {weight.device}, the index on {columns.device}"
        )
    if not trusted:
        require_index(name, _parts(weight.shape, index, out_features), x.device)
        _require_slices(name, index)


def _require_slices(name: str, index: TileIndex) -> None:
    """Refuse slices of other columns; they are made of them alone."""
    found = index.slice_entries
    if found is None or is_recorded(found):
        return
    from padst_kernels.tiles.cuda import slice_entries

    made = slice_entries(index.columns, index.in_features, len(found) if found.dim() else 1)
    if found.dtype != made.dtype or not found.is_contiguous() or not torch.equal(found, made):
        raise ValueError(f"{name}: slice_entries is not what `slice_entries` makes of columns")


def _parts(shape: torch.Size, index: TileIndex, out_features: int) -> list[Part]:
    """The fields of an index, with the shapes and ranges that `TileIndex` gives."""
    (num_tiles, width, height), in_features = shape, index.in_features
    num_groups = num_tiles if index.row_pointer is None else index.row_pointer.numel() - 1
    pointer = index.transposed_pointer
    num_column_groups = 0 if pointer is None else pointer.numel() - 1
    outputs = (num_tiles, height)
    return [
        ("columns", index.columns, (num_tiles, width), in_features, False),
        ("rows", index.rows, (num_groups * height,), out_features, False),
        ("row_pointer", index.row_pointer, (num_groups + 1,), num_tiles, True),
        ("order", index.order, (num_tiles,), num_tiles - 1, False),
        ("column_pointer", index.column_pointer, (in_features + 1,), num_tiles * width, True),
        ("slots", index.slots, (num_tiles * width,), num_tiles * width - 1, False),
        ("tile_rows", index.tile_rows, outputs, out_features, False),
        ("transposed_columns", index.transposed_columns, outputs, out_features, False),
        (
            "transposed_rows",
            index.transposed_rows,
            (num_column_groups * width,),
            in_features,
            False,
        ),
        ("transposed_pointer", pointer, (num_column_groups + 1,), num_tiles, True),
        ("transposed_order", index.transposed_order, (num_tiles,), num_tiles - 1, False),
    ]


def _gradients(
    needed: Sequence[bool],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: None,
    index: TileIndex,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and residual. What stood before GELU is computed again."""
    *_, gelu, feature_major, x_feature_major, backend = rest
    dx = dweight = dbias = None
    if gelu and any(needed[:3]):
        dy_z = product(
            x, weight, bias, None, index, dy, None, None, None,
            dy.shape[1], False, feature_major, False, backend,
        )  # fmt: skip
    else:
        dy_z = shared(dy, index.row_run(weight.shape[2]), backend)
    if needed[0]:
        dx = input_gradient(dy_z, weight, index, x_feature_major, backend)
    if needed[1]:
        dweight = weight_gradient(x, dy_z, index, weight.shape[2], backend)
    if needed[2]:
        assert bias is not None
        dbias = dy_z.sum(0, dtype=bias.dtype)
    return dx, dweight, dbias, dy if needed[3] else None


product = operator(
    "tile_matmul",
    passes.product,
    lambda x, *rest: empty_features(rest[-5], x.shape[0], x, feature_major=rest[-3]).t(),
    gradients=_gradients,
    prepare=lambda x, *rest: (shared(x, rest[3].column_run, rest[-1]), *rest),
    forgotten="residual",
)
input_gradient = operator(
    "tile_matmul_input_gradient",
    passes.input_gradient,
    lambda dy, weight, index, feature_major, backend: empty_features(
        index.in_features, dy.shape[0], dy, feature_major
    ).t(),
)
weight_gradient = operator(
    "tile_matmul_weight_gradient",
    passes.weight_gradient,
    lambda x, dy, index, height, backend: x.new_empty(*index.columns.shape, height),
)
