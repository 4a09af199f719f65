"""Grouped gather GEMM with what surrounds it in a block, between activations of either layout.

Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile.
Activations are `[features, T]` views, see activations.py; every saved tensor keeps its padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padst_kernels.activations import has_aligned_rows
from padst_kernels.backends import Backend
from padst_kernels.tiles.index import TileIndex
from padst_kernels.tiles.op import check, product

Norm = tuple[Tensor, Tensor, Tensor]


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
    trusted: bool = False,
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
        trusted: as in `tile_matmul`.

    Returns:
        `[O, T]`, dtype of x, feature-major and aligned or token-major. Differentiable in `x`,
        `weight`, `bias` and `residual`, once and in reverse mode; the gradient of x lies like x.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an activation is neither aligned nor
            token-major, there is no such backend for `x`, or a gradient is asked for together with
            `norm`.
        IndexError: a number in `index` is out of range.
    """
    name = "tile_matmul_fused"
    check(name, x, x.shape[0], weight, index, out_features, backend, trusted)
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
    # Features first out here, tokens first in there.
    y = product(
        x.t(),
        weight,
        bias,
        None if residual is None else residual.t(),
        index,
        None,
        mean,
        rstd,
        row_sums,
        out_features,
        gelu,
        feature_major,
        has_aligned_rows(x),
        backend,
    )
    return y.t()
