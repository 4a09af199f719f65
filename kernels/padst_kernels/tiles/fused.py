"""Grouped gather GEMM with what surrounds it in a block, between activations of either layout.

Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile.
Activations are `[features, T]` views, see activations.py; every saved tensor keeps its padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from padst_kernels import Backend
from padst_kernels.activations import empty_features, has_aligned_rows
from padst_kernels.calls import needs_operator
from padst_kernels.tiles import passes
from padst_kernels.tiles.index import TileIndex
from padst_kernels.tiles.op import (
    INDEX_SCHEMA,
    check,
    input_gradient,
    input_gradient_operator,
    weight_gradient,
    weight_gradient_operator,
)
from padst_kernels.tiles.passes import Norm


def tile_matmul_fused(
    x: Tensor,
    weight: Tensor,
    index: TileIndex,
    out_features: int,
    *,
    backend: Backend = "torch",
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    feature_major: bool = True,
) -> Tensor:
    """y = residual + gelu(bias + W x), W being the weight that `tile_matmul` multiplies with.

    Backward computes what stood before GELU again instead of keeping it.

    Args:
        x: floating point `[I, T]`, feature-major and aligned, as `aligned_features` and
            `empty_features` make it, or token-major: the `t()` of a contiguous `[T, I]`.
        weight: `[G, K, V]`, dtype of x.
        index: int32, made by `tile_index`.
        out_features: O.
        backend: as in `tile_matmul`.
        bias: `[O]`, any floating point.
        gelu: apply the exact (erf) GELU.
        residual: `[O, T]`, dtype of x, either layout.
        norm: LayerNorm of x without its affine part, folded in behind the product as
            rstd * (W x - mean * row_sums): mean `[T]` and rstd `[T]` of the tokens and sums `[O]`
            of the rows of W, float32, or float64 like x. Without gradients only.
        feature_major: layout of y.

    Returns:
        `[O, T]`, dtype of x, feature-major and aligned or token-major. Differentiable in `x`,
        `weight`, `bias` and `residual`, once and in reverse mode; the gradient of x lies like x.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an activation is neither aligned nor
            token-major, there is no such backend for `x`, or a gradient is asked for together with
            `norm`.
    """
    name = "tile_matmul_fused"
    check(name, x, x.shape[0], weight, index, out_features, backend)
    num_tokens = x.shape[1]
    mean, rstd, row_sums = norm or (None, None, None)
    wide = torch.promote_types(x.dtype, torch.float32)
    for what, tensor, shape, dtype in (
        ("bias", bias, (out_features,), None),
        ("residual", residual, (out_features, num_tokens), x.dtype),
        ("mean", mean, (num_tokens,), wide),
        ("rstd", rstd, (num_tokens,), wide),
        ("row_sums", row_sums, (out_features,), wide),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: {what} is {tuple(tensor.shape)}, expected {shape}")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name}: {what} is {tensor.dtype}, expected {dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: {what} is on {tensor.device}, x on {x.device}")
    for what, tensor in (("x", x), ("residual", residual)):
        if not (tensor is None or has_aligned_rows(tensor) or tensor.t().is_contiguous()):
            raise ValueError(
                f"{name}: {what} has strides {tensor.stride()}, expected feature-major rows that "
                "start on multiples of 16 elements, as aligned_features makes them, or token-major"
            )
    if norm is not None and torch.is_grad_enabled():
        given = (x, weight, bias, residual, *norm)
        if any(tensor is not None and tensor.requires_grad for tensor in given):
            raise ValueError(f"{name}: norm has no gradient; use torch.no_grad()")
    tensors = x, weight, bias, residual, mean, rstd, row_sums
    how: dict[str, Any] = {"gelu": gelu, "feature_major": feature_major, "backend": backend}
    if needs_operator(x, weight):
        return _operator(*tensors, *index, out_features, **how)
    if torch.is_grad_enabled():
        return _TileMatmulFused.apply(*tensors, *index, out_features, how)
    return _product(*tensors, *index, out_features, **how)


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    row_sums: Tensor | None,
    *rest: Any,
    gelu: bool,
    feature_major: bool,
    backend: Backend,
) -> Tensor:
    norm = None
    if mean is not None and rstd is not None and row_sums is not None:
        norm = (mean, rstd, row_sums)
    return passes.product(
        x.t(),
        weight,
        TileIndex(*rest[:-1]),
        rest[-1],
        backend,
        feature_major=feature_major,
        bias=bias,
        gelu=gelu,
        residual=None if residual is None else residual.t(),
        norm=norm,
    ).t()


def _gelu_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *fields: Any,
    feature_major: bool,
    backend: Backend,
) -> Tensor:
    """dy `[O, T]` times the derivative of GELU at bias + W x."""
    return passes.product(
        x.t(),
        weight,
        TileIndex(*fields),
        dy.shape[0],
        backend,
        feature_major=feature_major,
        bias=bias,
        gelu_gradient=dy.t(),
    ).t()


# As operators that torch.compile takes as they are.

_operator = torch.library.custom_op(
    "padst::tile_matmul_fused",
    _product,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? mean, Tensor? rstd, "
    f"Tensor? row_sums, {INDEX_SCHEMA}, SymInt out_features, *, bool gelu, "
    "bool feature_major, str backend) -> Tensor",
)
_gelu_gradient_operator = torch.library.custom_op(
    "padst::tile_matmul_gelu_gradient",
    _gelu_gradient,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor weight, Tensor? bias, {INDEX_SCHEMA}, *, "
    "bool feature_major, str backend) -> Tensor",
)


@_operator.register_fake
def _(x: Tensor, *rest: Any, gelu: bool, feature_major: bool, backend: Backend) -> Tensor:
    return empty_features(rest[-1], x.shape[1], x, feature_major)


@_gelu_gradient_operator.register_fake
def _(dy: Tensor, *rest: Any, feature_major: bool, backend: Backend) -> Tensor:
    return empty_features(dy.shape[0], dy.shape[1], dy, feature_major)


class _TileMatmulFused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors_and_features, ctx.how = arguments
        x, weight, bias = arguments[:3]
        ctx.save_for_backward(x, weight, bias, *tensors_and_features[7:-1])
        return _product(*tensors_and_features, **ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, _gelu_gradient, input_gradient, weight_gradient), None


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    x, weight, bias = inputs[:3]
    ctx.save_for_backward(x, weight, bias, *inputs[7:-1])
    ctx.how = keyword_only_inputs


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(
        ctx, dy, _gelu_gradient_operator, input_gradient_operator, weight_gradient_operator
    )


def _gradients(
    ctx: Any,
    dy: Tensor,
    gelu_gradient: Callable[..., Tensor],
    input_gradient: Callable[..., Tensor],
    weight_gradient: Callable[..., Tensor],
) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and residual; None for all that follows."""
    x, weight, bias, *fields = ctx.saved_tensors
    backend, feature_major = ctx.how["backend"], ctx.how["feature_major"]
    dx = dweight = dbias = None
    needs_dx, needs_dweight, needs_dbias, needs_dresidual = ctx.needs_input_grad[:4]
    dz = dy
    if ctx.how["gelu"] and (needs_dx or needs_dweight or needs_dbias):
        dz = gelu_gradient(
            dy, x, weight, bias, *fields, feature_major=feature_major, backend=backend
        )
    else:
        dz = passes.shared(dy.t(), TileIndex(*fields).row_run(weight.shape[2]), backend).t()
    if needs_dx:
        like_x = has_aligned_rows(x)
        dx = input_gradient(dz.t(), weight, *fields, feature_major=like_x, backend=backend).t()
    if needs_dweight:
        dweight = weight_gradient(x.t(), dz.t(), *fields, weight.shape[2], backend=backend)
    if needs_dbias:
        dbias = dz.sum(1, dtype=bias.dtype)
    dresidual = dy if needs_dresidual else None
    return dx, dweight, dbias, dresidual, *(None for _ in range(3 + len(fields) + 1))


_operator.register_autograd(_backward, setup_context=_setup_context)
