"""Scatter packed values into a dense weight, multiply, forget it; again in backward.

The fastest plain PyTorch way for single entries (unstructured, textbook N:M, single diagonals):
one dense product each for y, dx and dw, but nothing dense is kept between the passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from padst_kernels.checks import Part, require_index


def scatter_matmul(
    x: Tensor,
    values: Tensor,
    entries: Tensor,
    out_features: int,
    *,
    semi_structured: bool = False,
    trusted: bool = False,
) -> Tensor:
    """y = x @ W^T, where W `[O, I]` holds `values` at flat `entries` and zeros elsewhere.

    Args:
        x: floating point `[..., I]`.
        values: any shape, dtype of x.
        entries: int32 or int64, shape of `values`; row * I + column, distinct, or O * I for
            padding. Half the memory in int32; a pass widens it for as long as it needs it.
        out_features: O.
        semi_structured: y comes from the sparse tensor cores of a GPU (compute capability 8.0 or
            more; `torch.sparse.to_sparse_semi_structured`), at most two of each four neighbouring
            inputs of a row are among the entries, x is of two bytes an element, and O and I are
            multiples of 32 and 64. Gradients come from dense products. Not for compilation.
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
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _ScatterMatmul.apply(flat, values, entries, out_features, semi_structured)
    return y.view(*x.shape[:-1], out_features)


class _ScatterMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        entries: Tensor,
        out_features: int,
        semi_structured: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, values, entries)
        ctx.out_features = out_features
        dense = _dense(values, entries, out_features, x.shape[1])
        if semi_structured:
            return linear(x, torch.sparse.to_sparse_semi_structured(dense))
        return x @ dense.t()

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
        return dx, dvalues, None, None, None


def _dense(values: Tensor, entries: Tensor, out_features: int, in_features: int) -> Tensor:
    size = out_features * in_features
    flat = values.new_zeros(size + 1)
    flat.scatter_(0, entries.flatten().long(), values.flatten())
    return flat[:size].view(out_features, in_features)
