"""The truth for `diagonal_matmul`: a dense weight, then one matmul. Any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_matmul_reference(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    out_features: int,
    *,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Same contract as `diagonal_matmul`, differentiable by autograd."""
    in_features = x.shape[-1]
    cell = torch.arange(min(in_features, out_features), device=x.device)
    shifted = (cell + offsets[:, None].long()) % max(in_features, out_features)
    row, column = (cell, shifted) if out_features < in_features else (shifted, cell)
    row = row if rows is None else rows.long()[row]
    column = column if columns is None else columns.long()[column]
    at = torch.broadcast_tensors(row, column)
    return x @ values.new_zeros(out_features, in_features).index_put(at, values).t()
