"""The truth for `tile_matmul`: build the dense weight, multiply. Any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def tile_matmul_reference(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    owner: Tensor | None,
    positions: Tensor | None,
    num_row_groups: int,
    out_features: int,
) -> Tensor:
    """Same contract as `tile_matmul`; differentiable by autograd."""
    num_tiles, _, height = weight.shape
    if owner is None:
        owner = torch.arange(num_tiles, device=x.device)
    dense = weight.new_zeros(num_row_groups, height, x.shape[-1])
    for tile in range(num_tiles):
        dense = dense.index_put(
            (owner[tile, None, None], torch.arange(height)[:, None], columns[tile][None, :]),
            weight[tile].T,
            accumulate=True,
        )
    rows = dense.flatten(0, 1)
    rows = rows[:out_features] if positions is None else rows[positions]
    return x @ rows.T
