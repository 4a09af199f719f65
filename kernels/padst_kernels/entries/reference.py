"""The truth for `entry_matmul` and `condensed_matmul`: a dense weight, then one matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_kernels.entries.index import Condensed, EntryIndex


def entry_matmul_reference(
    x: Tensor, values: Tensor, index: EntryIndex, out_features: int
) -> Tensor:
    """Same contract as `entry_matmul`, differentiable by autograd. Any device, any dtype."""
    return x @ dense_weight(values, index, out_features).t()


def condensed_matmul_reference(x: Tensor, weight: Condensed) -> Tensor:
    """Same contract as `condensed_matmul`. Any device, any dtype."""
    rows = weight.rows.long().repeat_interleave(weight.row_pointer.diff())
    dense = weight.values.new_zeros(weight.out_features, weight.in_features)
    return x @ dense.index_put((rows, weight.columns.long()), weight.values).t()


def dense_weight(values: Tensor, index: EntryIndex, out_features: int) -> Tensor:
    """`[O, I]` with `values` at the entries of `index`, zeros elsewhere."""
    rows = torch.arange(out_features, device=values.device)
    # Padding stands last, beyond the last pointer.
    rows = rows.repeat_interleave(index.row_pointer.diff())
    columns = index.columns.long()[: len(rows)]
    values = values.flatten() if index.order is None else values.flatten()[index.order.long()]
    return values.new_zeros(out_features, index.in_features).index_put(
        (rows, columns), values[: len(rows)]
    )
