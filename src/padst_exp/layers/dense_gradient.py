"""The gradient of every entry of a sparse weight, active or not, which gradient growth needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from padst_exp.layers.sparse_weight import SparseWeight


def collect_dense_gradient(
    y: Tensor,
    x: Tensor,
    weight: SparseWeight,
    input_index: Tensor | None,
    output_index: Tensor | None,
) -> Tensor:
    """`y` itself; its backward also adds dy^T x, as seen from S, to `weight.dense_gradient`.

    With `weight.gradient_parts`, that of each run of so many equal runs of samples is kept too.

    Args:
        y: `[..., O]`, P_out S P_in x.
        x: `[..., I]`.
        weight: S.
        input_index: int64 `[I]`, P_in where it is not in x already; None for the identity.
        output_index: int64 `[O]`, P_out; None for the identity.
    """
    tapped: Tensor = _Tap.apply(y, x, weight, input_index, output_index)
    return tapped


def _sum(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one.add_(other)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        weight: SparseWeight,
        input_index: Tensor | None,
        output_index: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, input_index, output_index)
        ctx.weight = weight
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (dy,) = grads
        x, input_index, output_index = ctx.saved_tensors
        weight: SparseWeight = ctx.weight
        # Rows of S stand before P_out, its inputs behind P_in.
        rows, inputs = dy.flatten(0, -2), x.flatten(0, -2)
        if output_index is not None:
            rows = torch.zeros_like(rows).index_copy_(1, output_index, rows)
        if input_index is not None:
            inputs = inputs[:, input_index]
        dtype = torch.promote_types(weight.values.dtype, torch.float32)
        rows, inputs = rows.to(dtype), inputs.to(dtype)
        if weight.gradient_parts:
            number = weight.gradient_parts
            pairs = zip(rows.tensor_split(number), inputs.tensor_split(number), strict=True)
            parts = torch.stack([some.t() @ others for some, others in pairs])
            gradient = parts.sum(0)
            weight.part_gradients = _sum(weight.part_gradients, parts)
        else:
            gradient = rows.t() @ inputs
        weight.dense_gradient = _sum(weight.dense_gradient, gradient)
        return dy, None, None, None, None
