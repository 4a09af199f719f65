"""The gradient of every entry of a sparse weight, active or not, which gradient growth needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from padst_exp.layers.sparse_weight import SparseWeight


def collect_dense_gradients(
    y: Tensor,
    x: Tensor,
    weights: Sequence[SparseWeight],
    input_index: Tensor | None,
    output_indices: Sequence[Tensor | None],
) -> Tensor:
    """`y` itself; its backward also adds dy^T x, as seen from each S, to its `dense_gradient`.

    With `weight.gradient_parts`, that of each run of so many equal runs of samples is kept too.

    Args:
        y: `[..., sum of O]`, the concatenated P_out S P_in x.
        x: `[..., I]`.
        weights: of each part of `y`; those that `collect_dense_gradient`.
        input_index: int64 `[I]`, P_in where it is not in x already; None for the identity.
        output_indices: int64 `[O]` of each weight, P_out; None for the identity.
    """
    tapped: Tensor = _Tap.apply(y, x, weights, input_index, output_indices)
    return tapped


def collect_from_matrix(matrix: Tensor, weight: SparseWeight) -> Tensor:
    """`matrix` itself, S of `weight`; its backward also adds dS to the weight's `dense_gradient`.

    For a parent that multiplies by the matrix: samples are not told apart, whatever
    `weight.gradient_parts` says.
    """
    if weight.collect_dense_gradient and matrix.requires_grad:
        tapped: Tensor = _MatrixTap.apply(matrix, weight)
        return tapped
    return matrix


def _sum(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one.add_(other)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        weights: Sequence[SparseWeight],
        input_index: Tensor | None,
        output_indices: Sequence[Tensor | None],
    ) -> Tensor:
        ctx.save_for_backward(x, input_index, *output_indices)
        # As it is asked for in this forward pass, whatever the flags are in the backward one.
        ctx.parts = [(weight, weight.collect_dense_gradient) for weight in weights]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (dy,) = grads
        x, input_index, *output_indices = ctx.saved_tensors
        # Rows of S stand before P_out, its inputs behind P_in.
        inputs = x.flatten(0, -2)
        if input_index is not None:
            inputs = inputs[:, input_index]
        heights = [weight.shape[0] for weight, _ in ctx.parts]
        outputs = dy.flatten(0, -2).split(heights, dim=1)
        for rows, (weight, wanted), index in zip(outputs, ctx.parts, output_indices, strict=True):
            if not wanted:
                continue
            if index is not None:
                rows = torch.zeros_like(rows).index_copy_(1, index, rows)
            dtype = torch.promote_types(weight.values.dtype, torch.float32)
            _add(weight, rows.to(dtype), inputs.to(dtype))
        return dy, None, None, None, None


class _MatrixTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, weight: SparseWeight) -> Tensor:
        ctx.weight = weight
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = grads
        # Kept and added to, whereas autograd's own may be handed on to somebody else.
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        _keep(ctx.weight, gradient.to(dtype, copy=True))
        return gradient, None


def _add(weight: SparseWeight, rows: Tensor, inputs: Tensor) -> None:
    """Add rows^T inputs, `[T, O]` and `[T, I]`, to what `weight` has collected."""
    if weight.gradient_parts:
        number = weight.gradient_parts
        pairs = zip(rows.tensor_split(number), inputs.tensor_split(number), strict=True)
        parts = torch.stack([some.t() @ others for some, others in pairs])
        gradient = parts.sum(0)
        weight.part_gradients = _sum(weight.part_gradients, parts)
    else:
        gradient = rows.t() @ inputs
    _keep(weight, gradient)


def _keep(weight: SparseWeight, gradient: Tensor) -> None:
    """Add the dense gradient `[O, I]` of one backward pass to what `weight` has collected."""
    if weight.reduce_gradient is not None:
        gradient = weight.reduce_gradient(gradient)
    weight.dense_gradient = _sum(weight.dense_gradient, gradient)
