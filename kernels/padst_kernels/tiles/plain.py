"""The three passes in plain PyTorch, on any device: rows of x are gathered, products batched.

Shape letters as in op.py; x `[T, I]`, dy `[T, O]`, weight `[G, K, V]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padst_kernels.tiles.index import TileIndex

# With fewer tokens the two transpositions of the feature-major form cost more than they save.
MIN_FEATURE_MAJOR_TOKENS = 32

# Tokens gathered at a time: what fits in a cache. Half precision has fast products of wide
# matrices only; a GPU has no use for small ones, just a memory to spare.
TOKENS, TOKENS_HALF, TOKENS_GPU = 256, 1024, 8192


def product(x: Tensor, weight: Tensor, index: TileIndex, out_features: int) -> Tensor:
    """`[T, O]`, contiguous."""
    y = x.new_empty(x.shape[0], out_features)
    tiles = weight if index.order is None else weight.index_select(0, index.order)
    for part, out in zip(_split(x), _split(y), strict=True):
        out.copy_(_product(part, tiles, index, out_features))
    return y


def input_gradient(dy: Tensor, weight: Tensor, index: TileIndex) -> Tensor:
    """`[T, I]`, contiguous."""
    dx = dy.new_empty(dy.shape[0], index.in_features)
    num_rows, height = _num_rows(weight.shape, index), weight.shape[2]
    tiles = weight if index.order is None else weight.index_select(0, index.order)
    for part, out in zip(_split(dy), _split(dx), strict=True):
        dx_tiles = torch.bmm(tiles, _dy_tiles(part, index, num_rows, height)).flatten(0, 1)
        dx_rows = dx_tiles.new_zeros(index.in_features + 1, len(part))
        out.copy_(dx_rows.index_add_(0, index.columns.flatten(), dx_tiles)[:-1].t())
    return dx


def weight_gradient(x: Tensor, dy: Tensor, index: TileIndex, height: int) -> Tensor:
    """`[G, K, V]`, contiguous."""
    dweight = x.new_empty(*index.columns.shape, height)
    num_rows = _num_rows(dweight.shape, index)
    # Sums over tokens stay wide.
    total = dweight.new_zeros(dweight.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for x_part, dy_part in zip(_split(x), _split(dy), strict=True):
        dy_tiles = _dy_tiles(dy_part, index, num_rows, height)
        total += torch.bmm(_gather(x_part, index.columns, 0), dy_tiles.transpose(1, 2))
    in_order = total.to(x.dtype)
    if index.order is None:
        return in_order
    return dweight.index_copy_(0, index.order.long(), in_order)


def _split(x: Tensor) -> tuple[Tensor, ...]:
    if not x.is_cpu:
        return x.split(TOKENS_GPU)
    return x.split(TOKENS_HALF if x.element_size() == 2 else TOKENS)


def _product(x: Tensor, tiles: Tensor, index: TileIndex, out_features: int) -> Tensor:
    """`[T, O]` of a few tokens; `tiles` in the order of the index."""
    num_rows = _num_rows(tiles.shape, index)
    if len(x) < MIN_FEATURE_MAJOR_TOKENS:
        products = torch.bmm(_gather(x, index.columns, 1), tiles)  # [G, T, V]
        rows = _add_to_owners(products, index)  # [R, T, V]
        y = rows.transpose(0, 1).reshape(len(x), num_rows)
        if index.rows is None:
            return y[:, :out_features]
        out = y.new_empty(len(x), out_features + 1)
        return out.index_copy_(1, index.rows.long(), y)[:, :-1]
    products = torch.bmm(tiles.transpose(1, 2), _gather(x, index.columns, 0))  # [G, V, T]
    rows = _add_to_owners(products, index).view(num_rows, len(x))
    if index.rows is None:
        return rows[:out_features].t()
    out = rows.new_empty(out_features + 1, len(x))
    return out.index_copy_(0, index.rows.long(), rows)[:-1].t()


def _gather(x: Tensor, columns: Tensor, feature_dim: int) -> Tensor:
    """`[G, K, T]` through feature-major x (feature_dim 0), `[G, T, K]` token-major (1)."""
    num_tiles, width = columns.shape
    if feature_dim == 0:
        features = x.new_zeros(x.shape[1] + 1, len(x))
        features[:-1] = x.t()
        return features.index_select(0, columns.flatten()).view(num_tiles, width, len(x))
    padded = torch.nn.functional.pad(x, (0, 1))
    return padded.index_select(1, columns.flatten()).view(len(x), num_tiles, width).transpose(0, 1)


def _dy_tiles(dy: Tensor, index: TileIndex, num_rows: int, height: int) -> Tensor:
    """`[G, V, T]`, the rows of dy that each tile adds to, in the order of the index."""
    out_features = dy.shape[1]
    if index.rows is None and num_rows == out_features:
        rows = dy.t().contiguous()
    else:
        rows = dy.new_zeros(max(num_rows, out_features + 1), len(dy))
        rows[:out_features] = dy.t()
        rows = rows[:num_rows] if index.rows is None else rows.index_select(0, index.rows)
    groups = rows.view(num_rows // height, height, len(dy))
    owner = _owner(index)
    return groups if owner is None else groups.index_select(0, owner)


def _add_to_owners(products: Tensor, index: TileIndex) -> Tensor:
    owner = _owner(index)
    if owner is None:
        return products
    assert index.row_pointer is not None
    rows = products.new_zeros(len(index.row_pointer) - 1, *products.shape[1:])
    return rows.index_add_(0, owner, products)


def _owner(index: TileIndex) -> Tensor | None:
    """Row group of each place in the index."""
    if index.row_pointer is None:
        return None
    # Without its size the host would wait for the device.
    return torch.repeat_interleave(index.row_pointer.diff(), output_size=len(index.columns))


def _num_rows(weight_shape: torch.Size, index: TileIndex) -> int:
    num_tiles, _, height = weight_shape
    num_groups = num_tiles if index.row_pointer is None else len(index.row_pointer) - 1
    return num_groups * height
