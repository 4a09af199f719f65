"""Grouped gather GEMM of token-major activations, differentiable.

Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile,
R row groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from padst_kernels import Backend
from padst_kernels.activations import empty_features
from padst_kernels.calls import needs_operator
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

    Returns:
        `[..., O]`, dtype of x. Differentiable in `x` and `weight`, once and in reverse mode.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or there is no such backend for `x`.
    """
    check("tile_matmul", x, x.shape[-1], weight, index, out_features, backend)
    # Of few tokens a view takes longer than the product.
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if needs_operator(flat, weight):
        # Out here, so that backward has the copy too.
        flat = passes.shared(flat, index.column_run, backend)
        y = _operator(flat, weight, *index, out_features, backend=backend)
    elif torch.is_grad_enabled():
        y = _TileMatmul.apply(flat, weight, *index, out_features, backend)
    else:
        y = passes.product(flat, weight, index, out_features, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def check(
    name: str,
    x: Tensor,
    num_features: int,
    weight: Tensor,
    index: TileIndex,
    out_features: int,
    backend: str,
) -> None:
    """Raise a ValueError where the arguments of an operation `name` disagree."""
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


def _product(x: Tensor, weight: Tensor, *rest: Any, backend: Backend = "torch") -> Tensor:
    return passes.product(x, weight, TileIndex(*rest[:-1]), rest[-1], backend)


def input_gradient(
    dy: Tensor, weight: Tensor, *fields: Any, feature_major: bool, backend: Backend
) -> Tensor:
    """`passes.input_gradient`, as an operator takes its arguments."""
    index = TileIndex(*fields)
    return passes.input_gradient(dy, weight, index, backend, feature_major=feature_major)


def weight_gradient(x: Tensor, dy: Tensor, *rest: Any, backend: Backend) -> Tensor:
    """`passes.weight_gradient`, as an operator takes its arguments."""
    return passes.weight_gradient(x, dy, TileIndex(*rest[:-1]), rest[-1], backend)


# The same three as operators that torch.compile takes as they are.

INDEX_SCHEMA = ", ".join(f"Tensor? {name}" for name in TileIndex._fields)

_operator = torch.library.custom_op(
    "padst::tile_matmul",
    _product,
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, {INDEX_SCHEMA}, SymInt out_features, *, "
    "str backend='torch') -> Tensor",
)
input_gradient_operator = torch.library.custom_op(
    "padst::tile_matmul_input_gradient",
    input_gradient,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor weight, {INDEX_SCHEMA}, *, bool feature_major, str backend) "
    "-> Tensor",
)
weight_gradient_operator = torch.library.custom_op(
    "padst::tile_matmul_weight_gradient",
    weight_gradient,
    mutates_args=(),
    schema=f"(Tensor x, Tensor dy, {INDEX_SCHEMA}, SymInt height, *, str backend) -> Tensor",
)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any, backend: Backend = "torch") -> Tensor:
    return x.new_empty(x.shape[0], rest[-1])


@input_gradient_operator.register_fake
def _(dy: Tensor, weight: Tensor, *fields: Any, feature_major: bool, backend: Backend) -> Tensor:
    return empty_features(TileIndex(*fields).in_features, dy.shape[0], dy, feature_major).t()


@weight_gradient_operator.register_fake
def _(x: Tensor, dy: Tensor, *rest: Any, backend: Backend) -> Tensor:
    return x.new_empty(*rest[0].shape, rest[-1])


class _TileMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        *fields, out_features, ctx.backend = rest
        x = passes.shared(x, TileIndex(*fields).column_run, ctx.backend)
        ctx.save_for_backward(x, weight, *fields)
        return _product(x, weight, *fields, out_features, backend=ctx.backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, input_gradient, weight_gradient), None


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.backend = keyword_only_inputs["backend"]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, input_gradient_operator, weight_gradient_operator)


def _gradients(
    ctx: Any,
    dy: Tensor,
    input_gradient: Callable[..., Tensor],
    weight_gradient: Callable[..., Tensor],
) -> tuple[Tensor | None, ...]:
    x, weight, *fields = ctx.saved_tensors
    dy = passes.shared(dy, TileIndex(*fields).row_run(weight.shape[2]), ctx.backend)
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = input_gradient(dy, weight, *fields, feature_major=False, backend=ctx.backend)
    if ctx.needs_input_grad[1]:
        dweight = weight_gradient(x, dy, *fields, weight.shape[2], backend=ctx.backend)
    return dx, dweight, *(None for _ in fields), None


_operator.register_autograd(_backward, setup_context=_setup_context)
