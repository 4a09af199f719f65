"""Grouped gather GEMM, differentiable: one implementation for each device, one operator.

Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile,
R row groups.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from padst_kernels.gather_gemm import cpu
from padst_kernels.gather_gemm.index import TileIndex


def gather_gemm(x: Tensor, weight: Tensor, index: TileIndex, out_features: int) -> Tensor:
    """y[..., o] = sum over tiles g of o's row group of weight[g, :, v] . x[..., columns[g]].

    Permutations fold into `index`, on the input and on the output side, at no cost.

    Args:
        x: floating point `[..., I]`.
        weight: `[G, K, V]`, dtype of x.
        index: int32, made by `tile_index`.
        out_features: O.

    Returns:
        `[..., O]`, dtype of x. Differentiable in `x` and `weight`.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    if weight.shape[:2] != index.columns.shape:
        raise ValueError(
            f"gather_gemm: columns is {tuple(index.columns.shape)}, expected the first two sizes "
            f"of weight {tuple(weight.shape)}"
        )
    if x.shape[-1] != len(index.column_pointer) - 1:
        raise ValueError(
            f"gather_gemm: x is {tuple(x.shape)}, expected {len(index.column_pointer) - 1} features"
        )
    if x.dtype != weight.dtype:
        raise ValueError(
            f"gather_gemm: x is {x.dtype}, expected the dtype of weight {weight.dtype}"
        )
    flat = x.reshape(-1, x.shape[-1])
    # In eager mode a custom operator costs 20 us more a call than an autograd function.
    if torch.compiler.is_compiling():
        y = _operator(flat, weight, *index, out_features)
    elif torch.is_grad_enabled():
        y = _GatherGemm.apply(flat, weight, *index, out_features)
    else:
        y = _product(flat, weight, index, out_features)
    return y.view(*x.shape[:-1], out_features)


def _product(x: Tensor, weight: Tensor, index: TileIndex, out_features: int) -> Tensor:
    if not _on_triton(x):
        return cpu.product(x, weight, index, out_features)
    from padst_kernels.gather_gemm import kernels

    y = kernels.launch_product(
        x.contiguous().t(),
        weight.contiguous(),
        index.columns,
        index.row_pointer,
        out_features,
        rows=index.rows,
        order=index.order,
        feature_major=False,
        precision=_precision(),
    )
    return y.t()


def _input_gradient(dy: Tensor, weight: Tensor, index: TileIndex) -> Tensor:
    in_features = len(index.column_pointer) - 1
    if not _on_triton(dy):
        return cpu.input_gradient(dy, weight, index, in_features)
    from padst_kernels.gather_gemm import kernels

    dx = kernels.launch_input_gradient(
        dy.contiguous().t(),
        weight.contiguous(),
        index.tile_rows,
        index.column_pointer,
        index.slots,
        in_features,
        feature_major=False,
        precision=_precision(),
    )
    return dx.t()


def _weight_gradient(x: Tensor, dy: Tensor, index: TileIndex, height: int) -> Tensor:
    if not _on_triton(x):
        return cpu.weight_gradient(x, dy, index, height)
    from padst_kernels.gather_gemm import kernels

    return kernels.launch_weight_gradient(
        x.contiguous().t(),
        dy.contiguous().t(),
        index.columns,
        index.row_pointer,
        index.rows,
        height,
        order=index.order,
        precision=_precision(),
    )


Backend = Literal["auto", "torch", "triton"]

_backend: Backend = "auto"


def use_backend(backend: Backend) -> None:
    """Choose what computes on a GPU, for the whole process.

    Args:
        backend: `"torch"`: gathers and batched products of PyTorch; `"triton"`: the kernels of
            kernels.py; `"auto"`: PyTorch, as long as the kernels were checked in Triton's
            interpreter and by compilation only, not on a device.
    """
    global _backend
    _backend = backend


def _on_triton(x: Tensor) -> bool:
    half_or_float = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return _backend == "triton" and x.is_cuda and half_or_float


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


class _GatherGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        index, out_features = TileIndex(*rest[:-1]), rest[-1]
        ctx.save_for_backward(x, weight, *index)
        return _product(x, weight, index, out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        index = TileIndex(*rest)
        dx = _input_gradient(dy, weight, index) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(x, dy, index, weight.shape[2])
        return dx, dweight, *(None for _ in index), None


# The same three passes as operators that torch.compile takes as they are.


@torch.library.custom_op("padst::gather_gemm", mutates_args=())
def _operator(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    rows: Tensor | None,
    row_pointer: Tensor | None,
    order: Tensor | None,
    column_pointer: Tensor,
    slots: Tensor,
    tile_rows: Tensor,
    out_features: int,
) -> Tensor:
    index = TileIndex(columns, rows, row_pointer, order, column_pointer, slots, tile_rows)
    return _product(x, weight, index, out_features)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(len(x), rest[-1])


@torch.library.custom_op("padst::gather_gemm_input_gradient", mutates_args=())
def _input_gradient_operator(
    dy: Tensor,
    weight: Tensor,
    columns: Tensor,
    rows: Tensor | None,
    row_pointer: Tensor | None,
    order: Tensor | None,
    column_pointer: Tensor,
    slots: Tensor,
    tile_rows: Tensor,
) -> Tensor:
    index = TileIndex(columns, rows, row_pointer, order, column_pointer, slots, tile_rows)
    return _input_gradient(dy, weight, index)


@_input_gradient_operator.register_fake
def _(dy: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    index = TileIndex(*rest)
    return dy.new_empty(len(dy), len(index.column_pointer) - 1)


@torch.library.custom_op("padst::gather_gemm_weight_gradient", mutates_args=())
def _weight_gradient_operator(
    x: Tensor,
    dy: Tensor,
    columns: Tensor,
    rows: Tensor | None,
    row_pointer: Tensor | None,
    order: Tensor | None,
    column_pointer: Tensor,
    slots: Tensor,
    tile_rows: Tensor,
    height: int,
) -> Tensor:
    index = TileIndex(columns, rows, row_pointer, order, column_pointer, slots, tile_rows)
    return _weight_gradient(x, dy, index, height)


@_weight_gradient_operator.register_fake
def _(x: Tensor, dy: Tensor, columns: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*columns.shape, rest[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *index = ctx.saved_tensors
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient_operator(dy, weight, *index)
    if ctx.needs_input_grad[1]:
        dweight = _weight_gradient_operator(x, dy, *index, weight.shape[2])
    return dx, dweight, *(None for _ in index), None


_operator.register_autograd(_backward, setup_context=_setup_context)
