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

    Args:
        y: `[..., sum of O]`, the concatenated P_out S P_in x.
        x: `[..., I]`.
        weights: of each part of `y`; those that `collect_dense_gradient`.
        input_index: int64 `[I]`, P_in where it is not in x already; None for the identity.
        output_indices: int64 `[O]` of each weight, P_out; None for the identity.
    """
    tapped: Tensor = _Tap.apply(y, x, weights, input_index, output_indices)
    return tapped


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
        parts = dy.flatten(0, -2).split(heights, dim=1)
        for rows, (weight, wanted), index in zip(parts, ctx.parts, output_indices, strict=True):
            if not wanted:
                continue
            if index is not None:
                rows = torch.zeros_like(rows).index_copy_(1, index, rows)
            dtype = torch.promote_types(weight.values.dtype, torch.float32)
            gradient = rows.to(dtype).t() @ inputs.to(dtype)
            if weight.dense_gradient is None:
                weight.dense_gradient = gradient
            else:
                weight.dense_gradient += gradient
        return dy, None, None, None, None
