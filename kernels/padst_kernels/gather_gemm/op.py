"""Grouped gather GEMM in plain PyTorch, with a backward pass of its own on the packed values.

Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile,
R row groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# With fewer tokens the two transpositions of the feature-major form cost more than they save.
MIN_FEATURE_MAJOR_TOKENS = 32


def gather_gemm(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    owner: Tensor | None,
    positions: Tensor | None,
    num_row_groups: int,
    out_features: int,
) -> Tensor:
    """y[..., o] = sum over tiles g owned by o's row group of weight[g, :, v] . x[..., columns[g]].

    Where `positions[o] = r * V + v`, output o is row v of row group r. Permutations fold into
    `columns` (input side) and `positions` (output side) at no cost.

    Args:
        x: floating point `[..., I]`.
        weight: `[G, K, V]`, dtype of x.
        columns: int64 `[G, K]`, values in [0, I).
        owner: int64 `[G]`, the row group each tile adds to; None when tile g is row group g.
        positions: int64 `[O]`, distinct; None for the identity.
        num_row_groups: R.
        out_features: O, at most R * V.

    Returns:
        `[..., O]`, dtype of x. Differentiable in `x` and `weight`.

    Raises:
        ValueError: the shapes of `weight` and `columns` disagree.
    """
    if weight.shape[:2] != columns.shape:
        raise ValueError(
            f"gather_gemm: columns is {tuple(columns.shape)}, expected the first two sizes of "
            f"weight {tuple(weight.shape)}"
        )
    y: Tensor = _GatherGemm.apply(
        x.reshape(-1, x.shape[-1]), weight, columns, owner, positions, num_row_groups, out_features
    )
    return y.view(*x.shape[:-1], out_features)


class _GatherGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        columns: Tensor,
        owner: Tensor | None,
        positions: Tensor | None,
        num_row_groups: int,
        out_features: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, columns, owner, positions)
        ctx.num_row_groups = num_row_groups
        height = weight.shape[2]
        if len(x) < MIN_FEATURE_MAJOR_TOKENS:
            products = torch.bmm(_gather(x, columns, 1), weight)  # [G, T, V]
            rows = _add_to_owners(products, owner, num_row_groups)  # [R, T, V]
            y = rows.transpose(0, 1).reshape(len(x), -1)
            return y[:, :out_features] if positions is None else y.index_select(1, positions)
        gathered = _gather(x.t().contiguous(), columns, 0)  # [G, K, T]
        products = torch.bmm(weight.transpose(1, 2), gathered)  # [G, V, T]
        rows = _add_to_owners(products, owner, num_row_groups).view(num_row_groups * height, -1)
        y = rows[:out_features] if positions is None else rows.index_select(0, positions)
        return y.t().contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, columns, owner, positions = ctx.saved_tensors
        num_tiles, width, height = weight.shape
        num_rows = ctx.num_row_groups * height

        dy_rows = dy.t().contiguous()  # [O, T]
        if positions is not None or len(dy_rows) < num_rows:
            padded = dy_rows.new_zeros(num_rows, dy_rows.shape[1])
            if positions is None:
                padded[: len(dy_rows)] = dy_rows
            else:
                padded.index_copy_(0, positions, dy_rows)
            dy_rows = padded
        dy_tiles = dy_rows.view(ctx.num_row_groups, height, -1)
        if owner is not None:
            dy_tiles = dy_tiles.index_select(0, owner)  # [G, V, T]

        dx = dweight = None
        if ctx.needs_input_grad[1]:
            gathered = _gather(x.t().contiguous(), columns, 0)
            dweight = torch.bmm(gathered, dy_tiles.transpose(1, 2))
        if ctx.needs_input_grad[0]:
            dx_tiles = torch.bmm(weight, dy_tiles).view(num_tiles * width, -1)
            dx_rows = dx_tiles.new_zeros(x.shape[1], len(x))
            dx = dx_rows.index_add_(0, columns.flatten(), dx_tiles).t().contiguous()
        return dx, dweight, None, None, None, None, None


def _gather(x: Tensor, columns: Tensor, feature_dim: int) -> Tensor:
    """`[G, K, T]` from feature-major x (feature_dim 0), `[G, T, K]` from token-major x (1)."""
    num_tiles, width = columns.shape
    gathered = x.index_select(feature_dim, columns.flatten())
    if feature_dim == 0:
        return gathered.view(num_tiles, width, -1)
    return gathered.view(-1, num_tiles, width).transpose(0, 1)


def _add_to_owners(products: Tensor, owner: Tensor | None, num_row_groups: int) -> Tensor:
    if owner is None:
        return products
    rows = products.new_zeros(num_row_groups, *products.shape[1:])
    return rows.index_add_(0, owner, products)
