"""The truth for `tile_matmul`: a dense weight, then one matmul. Any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_kernels.tiles.index import TileIndex


def tile_matmul_reference(x: Tensor, weight: Tensor, index: TileIndex, out_features: int) -> Tensor:
    """Same contract as `tile_matmul`, differentiable by autograd."""
    return x @ dense_weight(weight, index, out_features).t()


def dense_weight(weight: Tensor, index: TileIndex, out_features: int) -> Tensor:
    """`[O, I]` of tiles `[G, K, V]`: the sum of all tiles, each at its rows and columns."""
    num_tiles, _, height = weight.shape
    place = torch.arange(num_tiles, device=weight.device)
    tile, group = place, place
    if index.row_pointer is not None and index.order is not None:
        tile = index.order.long()
        group = torch.searchsorted(index.row_pointer[1:].long(), place, right=True)
    positions = group[:, None] * height + torch.arange(height, device=weight.device)
    rows = positions.clamp(max=out_features)
    if index.rows is not None:
        rows = index.rows.long()[positions]
    # Padding goes to a row and a column beyond the matrix.
    size = out_features + 1, index.in_features + 1
    entries = rows[:, None, :] * size[1] + index.columns.long()[:, :, None]
    flat = weight.new_zeros(size[0] * size[1])
    flat = flat.index_add(0, entries.flatten(), weight[tile].flatten())
    return flat.view(size)[:-1, :-1]
