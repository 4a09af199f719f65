"""dW: a product over tokens, split over programs, and the sum of their parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from padst_kernels.activations import readable_tokens
from padst_kernels.devices import on_its_device
from padst_kernels.tiles.kernels.common import LaunchShape, block_height, load_columns


@triton.jit
def _weight_gradient_kernel(
    x,
    dy,
    columns,
    row_pointer,
    order,
    rows,
    partial,
    in_features,
    out_features,
    num_tokens,
    x_tokens,
    dy_tokens,
    split_tokens,
    split_stride,
    x_feature_stride,
    x_token_stride,
    dy_feature_stride,
    dy_token_stride,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    RUN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    parts: tl.constexpr = (HEIGHT + BLOCK_V - 1) // BLOCK_V
    group = tl.program_id(0) // parts
    v = tl.program_id(0) % parts * BLOCK_V + tl.arange(0, BLOCK_V)
    split = tl.program_id(2)
    if row_pointer is None:
        first = group
        num_columns = WIDTH
    else:
        first = tl.load(row_pointer + group)
        num_columns = (tl.load(row_pointer + group + 1) - first) * WIDTH
    group_columns = columns + first.to(tl.int64) * WIDTH

    row = group * HEIGHT + v
    if rows is not None:
        row = tl.load(rows + row, mask=v < HEIGHT, other=out_features)
    row_known = (row < out_features) & (v < HEIGHT)
    dy += row.to(tl.int64)[None, :] * dy_feature_stride
    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, num_tokens)
    whole = begin + (end - begin) // BLOCK_T * BLOCK_T

    for start in range(tl.program_id(1) * BLOCK_K, num_columns, tl.num_programs(1) * BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < num_columns
        place = first.to(tl.int64) * WIDTH + k
        column, known = load_columns(group_columns, k, inside, in_features, RUN)
        x_rows = x + column.to(tl.int64)[:, None] * x_feature_stride
        acc = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        for at in range(begin, whole, BLOCK_T):
            t = (at + tl.arange(0, BLOCK_T)).to(tl.int64)
            x_tile = tl.load(x_rows + t[None, :] * x_token_stride, mask=known[:, None], other=0.0)
            dy_tile = tl.load(dy + t[:, None] * dy_token_stride, mask=row_known[None, :], other=0.0)
            acc = tl.dot(x_tile, dy_tile, acc, input_precision=PRECISION)
        if whole < end:
            # Loads end at a multiple of 16 tokens to stay wide; what they read beyond the last
            # token is padding, which may hold anything.
            t = (whole + tl.arange(0, BLOCK_T)).to(tl.int64)
            x_mask = known[:, None] & (t < x_tokens)[None, :]
            x_tile = tl.load(x_rows + t[None, :] * x_token_stride, mask=x_mask, other=0.0)
            x_tile = tl.where((t < num_tokens)[None, :], x_tile, 0.0)
            dy_mask = row_known[None, :] & (t < dy_tokens)[:, None]
            dy_tile = tl.load(dy + t[:, None] * dy_token_stride, mask=dy_mask, other=0.0)
            dy_tile = tl.where((t < num_tokens)[:, None], dy_tile, 0.0)
            acc = tl.dot(x_tile, dy_tile, acc, input_precision=PRECISION)
        if order is not None:
            tile = tl.load(order + first + k // WIDTH, mask=inside, other=0)
            place = tile.to(tl.int64) * WIDTH + k % WIDTH
        out = partial + split.to(tl.int64) * split_stride + place[:, None] * HEIGHT + v[None, :]
        out_mask = inside[:, None]
        if HEIGHT % BLOCK_V != 0:
            out_mask = out_mask & (v < HEIGHT)[None, :]
        tl.store(out, acc.to(partial.dtype.element_ty), mask=out_mask)


@triton.jit
def _sum_partials_kernel(partial, total, size, num_splits, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    partial += entry
    for _ in range(num_splits):
        acc += tl.load(partial, mask=entry < size, other=0.0)
        partial += size
    tl.store(total + entry, acc.to(total.dtype.element_ty), mask=entry < size)


@on_its_device
def launch_weight_gradient(
    x: Tensor,
    dy: Tensor,
    columns: Tensor,
    row_pointer: Tensor | None,
    rows: Tensor | None,
    height: int,
    *,
    order: Tensor | None = None,
    run: int = 1,
    precision: str = "ieee",
    splits: int | None = None,
    launch: LaunchShape | None = None,
) -> Tensor:
    """dweight[g, k, v] = sum over t of x[columns[g, k], t] * dy[rows[r, v], t], g in row group r.

    Tokens are split over programs; a second pass adds their float32 sums in a fixed order.

    Args:
        x: `[I, T]` view.
        dy: `[O, T]` view, dtype of x.
        columns: int32 `[G, K]`, as in `launch_product`.
        row_pointer: int32 `[R + 1]`, or None when tile r is row group r.
        rows: int32 `[R * V]`, or None when y lies in natural order.
        height: V.
        order: int32 `[G]`, which tile of the result stands at each place of `columns`; needs
            `row_pointer`.
        run: columns come in aligned runs, see `launch_product`.
        precision: of float32 products.
        splits: programs the tokens are split over, by default enough to fill a large GPU.
        launch: sizes to use instead of the default; `columns` is the extent of K in one program.

    Returns:
        `[G, K, V]`, dtype of x.

    Raises:
        ValueError: a feature-major activation is not aligned.
    """
    num_tiles, width = columns.shape
    assert columns.is_contiguous() and width % run == 0 and dy.dtype == x.dtype
    assert order is None or row_pointer is not None
    out = x.new_empty(num_tiles, width, height)
    if not out.numel():
        return out
    num_groups = num_tiles if row_pointer is None else len(row_pointer) - 1
    num_tokens = x.shape[1]
    block_v = block_height(height)
    # An average row group; one with more tiles loops.
    extent = width * triton.cdiv(num_tiles, num_groups)
    launch = launch or _launch_shape(x, extent, block_v, run)
    programs = num_groups * triton.cdiv(height, block_v), triton.cdiv(extent, launch.columns)
    if splits is None:
        splits = max(1, min(1024 // (programs[0] * programs[1]), num_tokens // 512))
    split_tokens = (
        max(1, triton.cdiv(triton.cdiv(num_tokens, splits), launch.tokens)) * launch.tokens
    )
    splits = max(1, triton.cdiv(num_tokens, split_tokens))
    partial = out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    _weight_gradient_kernel[(*programs, splits)](
        x,
        dy,
        columns,
        row_pointer,
        order,
        rows,
        partial,
        x.shape[0],
        dy.shape[0],
        num_tokens,
        readable_tokens("x", x),
        readable_tokens("dy", dy),
        split_tokens,
        out.numel(),
        *x.stride(),
        *dy.stride(),
        WIDTH=width,
        HEIGHT=height,
        RUN=run,
        PRECISION=precision,
        BLOCK_T=launch.tokens,
        BLOCK_K=launch.columns,
        BLOCK_V=block_v,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    if splits > 1:
        block = 1024
        _sum_partials_kernel[(triton.cdiv(out.numel(), block),)](
            partial, out, out.numel(), splits, BLOCK=block, num_warps=4
        )
    return out


def _launch_shape(x: Tensor, extent: int, block_v: int, run: int) -> LaunchShape:
    tokens = min(128 // x.element_size(), max(16, triton.next_power_of_2(x.shape[1])))
    columns = min(128, max(16, triton.next_power_of_2(extent)))
    many = columns * block_v >= 128 * 64
    if x.stride(0) == 1 and run < 8:
        tokens, many = min(tokens, 32), columns >= 64
    return LaunchShape(tokens, columns, warps=8 if many else 4, stages=4)
