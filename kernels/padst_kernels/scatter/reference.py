"""The truth for `scatter_matmul`: a dense weight, then one matmul. Any device, any dtype."""

from __future__ import annotations

from torch import Tensor


def scatter_matmul_reference(
    x: Tensor, values: Tensor, entries: Tensor, out_features: int
) -> Tensor:
    """Same contract as `scatter_matmul`, differentiable by autograd, which keeps the weight."""
    size = out_features * x.shape[-1]
    inside = entries < size
    dense = values.new_zeros(size).index_put((entries[inside].long(),), values[inside])
    return x @ dense.view(out_features, -1).t()
