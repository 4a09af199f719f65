"""Scatter packed values into a dense weight, multiply, forget it; again in backward.

The fastest plain PyTorch way for single entries (unstructured, textbook N:M, single diagonals):
one dense product each for y, dx and dw, but nothing dense is kept between the passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from padst_kernels.checks import Part, require_index


def scatter_matmul(
    x: Tensor, values: Tensor, entries: Tensor, out_features: int, *, trusted: bool = False
) -> Tensor:
    """y = x @ W^T, where W `[O, I]` holds `values` at flat `entries` and zeros elsewhere.

    Args:
        x: floating point `[..., I]`.
        values: any shape, dtype of x.
        entries: int32 or int64, shape of `values`; row * I + column, distinct, or O * I for
            padding. Half the memory in int32; a pass widens it for as long as it needs it.
        out_features: O.
        trusted: `entries` are as promised, so that no call looks at its numbers.

    Returns:
        `[..., O]`, dtype of x. Differentiable in `x` and `values` (zero at padding).

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        IndexError: an entry is out of range.
    """
    if not trusted:
        entries = entries.contiguous()
        shape, largest = (values.numel(),), out_features * x.shape[-1]
        part: Part = ("entries", entries.flatten(), shape, largest, False)
        require_index("scatter_matmul", [part], x.device, (torch.int32, torch.int64))
    y: Tensor = _ScatterMatmul.apply(x.reshape(-1, x.shape[-1]), values, entries, out_features)
    return y.view(*x.shape[:-1], out_features)


class _ScatterMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, entries: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(x, values, entries)
        ctx.out_features = out_features
        return x @ _dense(values, entries, out_features, x.shape[1]).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, values, entries = ctx.saved_tensors
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _dense(values, entries, ctx.out_features, x.shape[1])
        if ctx.needs_input_grad[1]:
            size = ctx.out_features * x.shape[1]
            dense = dy.new_zeros(size + 1)
            torch.mm(dy.t(), x, out=dense[:size].view(ctx.out_features, -1))
            dvalues = dense[entries.long()]
        return dx, dvalues, None, None


def _dense(values: Tensor, entries: Tensor, out_features: int, in_features: int) -> Tensor:
    size = out_features * in_features
    flat = values.new_zeros(size + 1)
    flat.scatter_(0, entries.flatten().long(), values.flatten())
    return flat[:size].view(out_features, in_features)
