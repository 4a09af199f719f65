"""The passes of weights of single entries, by whichever backend is asked for.

Plain PyTorch, which also stands in where C++ has no kernel, goes through a dense weight that lives
only during a pass. Shape letters as in op.py; x `[T, I]`, dy `[T, O]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padst_kernels.activations import aligned_features
from padst_kernels.backends import Backend
from padst_kernels.devices import runs_on_triton
from padst_kernels.entries import native
from padst_kernels.entries.index import EntryIndex
from padst_kernels.scatter import scatter_matmul

# Tokens that plain PyTorch sums at a time: their features stay in a cache.
TOKENS = 64
# With more of them the bytes of x and y count, not those of the weight.
MAX_TRITON_TOKENS = 64


def product(
    x: Tensor, values: Tensor, index: EntryIndex, out_features: int, backend: Backend
) -> Tensor:
    """`[T, O]`, contiguous."""
    y = native.product(x, values, index, out_features) if backend == "native" else None
    if y is None:
        y = scatter_matmul(
            x, values.flatten(), _entries(*index[:3], x.shape[1]), out_features, trusted=True
        )
    return y


def input_gradient(dy: Tensor, values: Tensor, index: EntryIndex, backend: Backend) -> Tensor:
    """`[T, I]`, contiguous."""
    dx = native.input_gradient(dy, values, index) if backend == "native" else None
    if dx is None:
        transposed = _entries(*index[3:], dy.shape[1])
        dx = scatter_matmul(dy, values.flatten(), transposed, index.in_features, trusted=True)
    return dx


def values_gradient(x: Tensor, dy: Tensor, index: EntryIndex, backend: Backend) -> Tensor:
    """`[S]`, zero at padding."""
    dvalues = native.values_gradient(x, dy, index) if backend == "native" else None
    if dvalues is None:
        dense = (dy.t() @ x).flatten()
        dvalues = torch.cat([dense, dense.new_zeros(1)])[_entries(*index[:3], x.shape[1])]
    return dvalues


def condensed_product(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_pointer: Tensor,
    rows: Tensor,
    out_features: int,
    backend: Backend,
) -> Tensor:
    """`[T, O]`, contiguous."""
    num_tokens = x.shape[0]
    if not num_tokens or not rows.numel():
        return x.new_zeros(num_tokens, out_features)
    weight = values, columns, row_pointer, rows, out_features
    y = native.condensed_product(x, *weight) if backend == "native" else None
    if y is not None:
        return y
    if runs_on_triton(x, backend) and num_tokens <= MAX_TRITON_TOKENS:
        from padst_kernels.entries import kernels

        # A single token is feature-major either way.
        x = x.contiguous().t() if num_tokens <= 1 else aligned_features(x)
        return kernels.launch_condensed(x, *weight).t()
    y = x.new_zeros(num_tokens, out_features)
    columns = columns.int()
    for part, out in zip(x.split(TOKENS), y.split(TOKENS), strict=True):
        sums = torch.nn.functional.embedding_bag(
            columns,
            part.t().contiguous(),
            row_pointer,
            mode="sum",
            per_sample_weights=values,
            include_last_offset=True,
        )
        out.index_copy_(1, rows.long(), sums.t())
    return y


def _entries(pointer: Tensor, columns: Tensor, order: Tensor | None, in_features: int) -> Tensor:
    """Flat entries in the order of the values, int64 `[S]`."""
    places = torch.arange(len(columns), dtype=torch.int32, device=columns.device)
    # Padding counts as row O, column 0.
    rows = torch.searchsorted(pointer, places, right=True) - 1
    columns = columns.long()
    if columns.is_cpu and len(columns) and int(columns.max()) >= in_features:
        raise IndexError(f"entries: an index is out of range for {in_features} features")
    entries = rows * in_features + columns
    if order is None:
        return entries
    return torch.empty_like(entries).scatter_(0, order.long(), entries)
