"""Triton kernels of the grouped gather GEMM, and their launchers: tensors in, tensors out.

    launch_product(x, weight, columns, row_pointer, out_features, *, rows, order, transposed, run,
                   bias, gelu, residual, feature_major, out, precision, tile) -> y [O, T]
    launch_input_gradient(dy, weight, rows, column_pointer, slots, in_features, *, run,
                          feature_major, precision, workspace, tile) -> dx [I, T]
    launch_weight_gradient(x, dy, columns, row_pointer, rows, height, *, order, run, precision,
                           dtype, splits, tile) -> dweight [G, K, V]

Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile,
R row groups. Activations are `[features, T]` views, and their strides say how they lie in memory:
feature-major (tokens contiguous) is `memory[:, :T]` of a `[features, LD]` tensor, as
`empty_features` makes it; token-major (features contiguous) is `memory.t()` of `[T, features]`.
A feature-major tensor whose rows do not all start on a multiple of 16 elements is refused. What
lies in its padding columns is never read into a result, and those of an output hold anything.

Index tensors are int32. Permutations are folded into them by the caller: `columns` holds the
feature of x behind each column of a tile, `rows` the feature of y behind each row of a row group
(None: in natural order). A feature out of range marks padding: read as zero, never stored.
README.md has the maths and what the compiled code must look like.
"""

# Arguments of Triton kernels have no Python types.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a feature-major tensor start on multiples of this many elements: 16-byte copies.
ALIGNMENT = 16


@dataclass(frozen=True)
class Tile:
    """What one program computes: `tokens` x `columns` per step, by `warps`, `stages` deep.

    With `row_blocks` above 1 a program computes that many neighbouring blocks of rows one after the
    other (the largest common divisor with how many there are), and reads x through the L1 cache.
    """

    tokens: int
    columns: int
    warps: int
    stages: int
    row_blocks: int = 1


@triton.jit
def _product_kernel(
    x,
    weight,
    columns,
    row_pointer,
    order,
    rows,
    bias,
    residual,
    y,
    in_features,
    out_features,
    x_tokens,
    y_tokens,
    x_feature_stride,
    x_token_stride,
    y_feature_stride,
    y_token_stride,
    residual_feature_stride,
    residual_token_stride,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH_STRIDE: tl.constexpr,
    HEIGHT_STRIDE: tl.constexpr,
    RUN: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
):
    # Row groups are the fastest axis, so that all of them meet a token tile while it is in L2.
    parts: tl.constexpr = (HEIGHT + BLOCK_V - 1) // BLOCK_V
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    x += t.to(tl.int64)[:, None] * x_token_stride
    if residual is not None:
        residual += t.to(tl.int64)[:, None] * residual_token_stride
    y += t.to(tl.int64)[:, None] * y_token_stride
    for step in range(ROW_BLOCKS):
        block = tl.program_id(0) * ROW_BLOCKS + step
        group = block // parts
        v = block % parts * BLOCK_V + tl.arange(0, BLOCK_V)
        if row_pointer is None:
            first = group
            num_columns = WIDTH
        else:
            first = tl.load(row_pointer + group)
            num_columns = (tl.load(row_pointer + group + 1) - first) * WIDTH
        group_columns = columns + first.to(tl.int64) * WIDTH

        # Tokens on M: with V on N, wgmma serves every V from 8.
        acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for start in range(0, num_columns, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = k < num_columns
            if RUN == 1:
                column = tl.load(group_columns + k, mask=inside, other=in_features)
            else:
                run = tl.load(group_columns + k // RUN * RUN, mask=inside, other=in_features)
                column = run // RUN * RUN + k % RUN
            known = inside & (column < in_features)
            x_tile = tl.load(
                x + column.to(tl.int64)[None, :] * x_feature_stride,
                mask=known[None, :] & (t < x_tokens)[:, None],
                other=0.0,
                cache_modifier=".ca" if ROW_BLOCKS > 1 else "",
            )
            if row_pointer is None:
                tile = first
                inner = k
            else:
                tile = first + k // WIDTH
                inner = k % WIDTH
                if order is not None:
                    tile = tl.load(order + tile, mask=inside, other=0)
            offset = tile.to(tl.int64) * (WIDTH * HEIGHT) + inner * WIDTH_STRIDE
            weight_mask = inside[:, None]
            if HEIGHT % BLOCK_V != 0:
                weight_mask = weight_mask & (v < HEIGHT)[None, :]
            weight_tile = tl.load(
                weight + offset[:, None] + (v * HEIGHT_STRIDE)[None, :], mask=weight_mask, other=0.0
            )
            acc = tl.dot(x_tile, weight_tile, acc, input_precision=PRECISION)

        row = group * HEIGHT + v
        if rows is not None:
            row = tl.load(rows + row, mask=v < HEIGHT, other=out_features)
        stored = row < out_features
        if HEIGHT % BLOCK_V != 0:
            stored = stored & (v < HEIGHT)
        if bias is not None:
            acc += tl.load(bias + row, mask=stored, other=0.0).to(tl.float32)[None, :]
        if GELU:
            acc = 0.5 * acc * (1.0 + tl.math.erf(acc * 0.7071067811865476))
        mask = stored[None, :] & (t < y_tokens)[:, None]
        if residual is not None:
            at = residual + row.to(tl.int64)[None, :] * residual_feature_stride
            acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at = y + row.to(tl.int64)[None, :] * y_feature_stride
        tl.store(at, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _slot_sum_kernel(
    z,
    column_pointer,
    slots,
    dx,
    in_features,
    z_tokens,
    dx_tokens,
    z_feature_stride,
    dx_feature_stride,
    dx_token_stride,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.load(column_pointer + i, mask=i < in_features, other=0)
    last = tl.load(column_pointer + i + 1, mask=i < in_features, other=0)
    acc = tl.zeros((BLOCK_I, BLOCK_T), tl.float32)
    for step in range(0, tl.max(last - first, 0)):
        inside = first + step < last
        slot = tl.load(slots + first + step, mask=inside, other=0)
        acc += tl.load(
            z + slot.to(tl.int64)[:, None] * z_feature_stride + t[None, :],
            mask=inside[:, None] & (t < z_tokens)[None, :],
            other=0.0,
        ).to(tl.float32)
    dx += i.to(tl.int64)[:, None] * dx_feature_stride + t.to(tl.int64)[None, :] * dx_token_stride
    mask = (i < in_features)[:, None] & (t < dx_tokens)[None, :]
    tl.store(dx, acc.to(dx.dtype.element_ty), mask=mask)


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
        if RUN == 1:
            column = tl.load(columns + place, mask=inside, other=in_features)
        else:
            run = tl.load(
                columns + first.to(tl.int64) * WIDTH + k // RUN * RUN,
                mask=inside,
                other=in_features,
            )
            column = run // RUN * RUN + k % RUN
        known = inside & (column < in_features)
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


def launch_product(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    row_pointer: Tensor | None,
    out_features: int,
    *,
    rows: Tensor | None = None,
    order: Tensor | None = None,
    transposed: bool = False,
    run: int = 1,
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    feature_major: bool = True,
    out: Tensor | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Tensor:
    """y[rows[r, v]] = residual + gelu(bias + sum weight[g, k, v] x[columns[g, k]] over g in r, k).

    The forward pass, and dX of a structure whose transpose is one of this family: there x is dY,
    row groups are groups of inputs, and `order` lists the tiles of the forward weight by them.

    Args:
        x: `[I, T]` view, float32, bfloat16 or float16.
        weight: `[G, K, V]`, dtype of x, contiguous; `[G, V, K]` if `transposed`.
        columns: int32 `[G, K]`, features of x; the tiles of a row group follow each other.
        row_pointer: int32 `[R + 1]`, tiles of row group r are row_pointer[r] to row_pointer[r + 1];
            None when tile r is row group r.
        out_features: O.
        rows: int32 `[R * V]`, each feature below O once; None when y lies in natural order.
        order: int32 `[G]`, which tile of `weight` stands at each place of `columns`; needs
            `row_pointer`.
        transposed: read every tile of `weight` transposed.
        run: columns come in whole aligned runs: columns[g, j * run + i] = run * c + i, run divides
            K. Fewer index loads, and 16-byte ones of a token-major x.
        bias: `[O]`, any floating point.
        gelu: apply the exact (erf) GELU.
        residual: `[O, T]` view; may be `out`, to add to it.
        feature_major: layout of y.
        out: `[O, T]` view to write to instead, any floating point; part of a larger y, say. Where
            feature-major, it is written up to the next multiple of 16 tokens.
        precision: of float32 products: "ieee" or "tf32".
        tile: sizes to use instead of the default for this shape.

    Returns:
        `[O, T]` view, dtype of x; or `out`.

    Raises:
        ValueError: a feature-major activation is not aligned.
    """
    width, height = weight.shape[1:]
    strides = (height, 1)
    if transposed:
        width, height = height, width
        strides = (1, width)
    num_groups = len(columns) if row_pointer is None else len(row_pointer) - 1
    assert columns.shape == (len(weight), width) and columns.is_contiguous() and width % run == 0
    assert weight.is_contiguous() and weight.dtype == x.dtype
    assert order is None or row_pointer is not None
    in_features, num_tokens = x.shape
    y = empty_features(out_features, num_tokens, x, feature_major) if out is None else out
    block_v = _block_height(height)
    num_blocks = num_groups * triton.cdiv(height, block_v)
    if tile is None:
        extent = width * triton.cdiv(len(columns), num_groups)
        tile = _product_tile(x, extent, block_v, run)
    y_tokens = readable_tokens("y", y)
    if residual is not None:
        y_tokens = min(y_tokens, readable_tokens("residual", residual))
    row_blocks = math.gcd(tile.row_blocks, num_blocks)
    _product_kernel[num_blocks // row_blocks, triton.cdiv(num_tokens, tile.tokens)](
        x,
        weight,
        columns,
        row_pointer,
        order,
        rows,
        bias,
        residual,
        y,
        in_features,
        out_features,
        readable_tokens("x", x),
        y_tokens,
        *x.stride(),
        *y.stride(),
        *((0, 0) if residual is None else residual.stride()),
        WIDTH=width,
        HEIGHT=height,
        WIDTH_STRIDE=strides[0],
        HEIGHT_STRIDE=strides[1],
        RUN=run,
        GELU=gelu,
        PRECISION=precision,
        BLOCK_T=tile.tokens,
        BLOCK_K=tile.columns,
        BLOCK_V=block_v,
        ROW_BLOCKS=row_blocks,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y


def launch_input_gradient(
    dy: Tensor,
    weight: Tensor,
    rows: Tensor,
    column_pointer: Tensor,
    slots: Tensor,
    in_features: int,
    *,
    run: int = 1,
    feature_major: bool = True,
    precision: str = "ieee",
    workspace: int = 1 << 28,
    tile: Tile | None = None,
) -> Tensor:
    """dx[i] = sum over slots s = g * K + k with columns[g, k] = i of weight[g, k] . dy[rows[g]].

    For structures that are not closed under transposition, in two deterministic passes: every
    slot's product Z `[G * K, T]` is written in the dtype of dy, then each input adds its slots.

    Args:
        dy: `[O, T]` view.
        weight: `[G, K, V]`, dtype of dy, contiguous.
        rows: int32 `[G, V]`, the feature of y behind each row of tile g.
        column_pointer: int32 `[I + 1]`, the slots of input i are column_pointer[i] to
            column_pointer[i + 1].
        slots: int32 `[G * K]`, sorted by their column.
        in_features: I.
        run: `rows` comes in aligned runs, see `launch_product`.
        feature_major: layout of dx.
        precision: of float32 products.
        workspace: bytes of Z to hold at a time; tokens are cut to stay below.
        tile: sizes for the first pass.

    Returns:
        `[I, T]` view, dtype of dy.

    Raises:
        ValueError: a feature-major activation is not aligned.
    """
    num_tokens = dy.shape[1]
    num_slots = weight.shape[0] * weight.shape[1]
    dx = empty_features(in_features, num_tokens, dy, feature_major)
    chunk = max(workspace // (num_slots * dy.element_size()) // 128 * 128, 128)
    for begin in range(0, num_tokens, chunk):
        dy_chunk, dx_chunk = dy[:, begin : begin + chunk], dx[:, begin : begin + chunk]
        z = launch_product(
            dy_chunk,
            weight,
            rows,
            None,
            num_slots,
            transposed=True,
            run=run,
            precision=precision,
            tile=tile,
        )
        block_t = min(128, max(16, triton.next_power_of_2(z.shape[1])))
        _slot_sum_kernel[triton.cdiv(in_features, 16), triton.cdiv(z.shape[1], block_t)](
            z,
            column_pointer,
            slots,
            dx_chunk,
            in_features,
            readable_tokens("z", z),
            readable_tokens("dx", dx_chunk),
            z.stride(0),
            *dx_chunk.stride(),
            BLOCK_I=16,
            BLOCK_T=block_t,
            num_warps=4,
        )
    return dx


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
    dtype: torch.dtype | None = None,
    splits: int | None = None,
    tile: Tile | None = None,
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
        dtype: of the result; that of x by default.
        splits: programs the tokens are split over, by default enough to fill a large GPU.
        tile: sizes to use instead of the default; `columns` is the extent of K in one program.

    Returns:
        `[G, K, V]`.

    Raises:
        ValueError: a feature-major activation is not aligned.
    """
    num_tiles, width = columns.shape
    assert columns.is_contiguous() and width % run == 0 and dy.dtype == x.dtype
    assert order is None or row_pointer is not None
    num_groups = num_tiles if row_pointer is None else len(row_pointer) - 1
    num_tokens = x.shape[1]
    block_v = _block_height(height)
    # An average row group; one with more tiles loops.
    extent = width * triton.cdiv(num_tiles, num_groups)
    tile = tile or _weight_gradient_tile(x, extent, block_v, run)
    programs = num_groups * triton.cdiv(height, block_v), triton.cdiv(extent, tile.columns)
    if splits is None:
        splits = max(1, min(1024 // (programs[0] * programs[1]), num_tokens // 512))
    split_tokens = max(1, triton.cdiv(triton.cdiv(num_tokens, splits), tile.tokens)) * tile.tokens
    splits = max(1, triton.cdiv(num_tokens, split_tokens))
    out = x.new_empty(num_tiles, width, height, dtype=dtype or x.dtype)
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
        BLOCK_T=tile.tokens,
        BLOCK_K=tile.columns,
        BLOCK_V=block_v,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        block = 1024
        _sum_partials_kernel[(triton.cdiv(out.numel(), block),)](
            partial, out, out.numel(), splits, BLOCK=block, num_warps=4
        )
    return out


def empty_features(
    num_features: int, num_tokens: int, like: Tensor, feature_major: bool = True
) -> Tensor:
    """An uninitialised `[num_features, num_tokens]` view, aligned, dtype and device of `like`."""
    if not feature_major:
        return like.new_empty(num_tokens, num_features).t()
    padded = triton.cdiv(num_tokens, ALIGNMENT) * ALIGNMENT
    return like.new_empty(num_features, padded)[:, :num_tokens]


def readable_tokens(name: str, x: Tensor) -> int:
    """How many tokens may be touched: the padding of feature-major rows keeps accesses wide."""
    num_tokens = x.shape[1]
    if x.stride(0) == 1:
        return num_tokens
    start = x.data_ptr() // x.element_size()
    if x.stride(1) != 1 or x.stride(0) % ALIGNMENT or start % ALIGNMENT:
        raise ValueError(
            f"{name}: feature-major rows must start on multiples of {ALIGNMENT} elements, got "
            f"strides {x.stride()} at element {start % ALIGNMENT}; use empty_features, or give a "
            "token-major tensor"
        )
    return triton.cdiv(num_tokens, ALIGNMENT) * ALIGNMENT


def _block_height(height: int) -> int:
    """Rows of a tile that one program computes: a power of two of at least 8."""
    if height >= 128:
        return 128
    return max(8, triton.next_power_of_2(height))


def _product_tile(x: Tensor, width: int, block_v: int, run: int) -> Tile:
    tokens = min(128, max(16, triton.next_power_of_2(x.shape[1])))
    # 64 columns make 16-byte copies of a weight tile 16 rows high by 128 threads; 4-byte operands
    # fill shared memory twice as fast.
    columns = min(64 if x.element_size() == 2 else 32, max(16, triton.next_power_of_2(width)))
    if x.stride(0) == 1 and run < 8:
        # Every element of a token-major gather is addressed by itself, out of registers.
        tokens, columns = min(tokens, 64), min(columns, 32)
    return Tile(tokens, columns, warps=8 if tokens * block_v >= 128 * 128 else 4, stages=5)


def _weight_gradient_tile(x: Tensor, extent: int, block_v: int, run: int) -> Tile:
    tokens = min(128 // x.element_size(), max(16, triton.next_power_of_2(x.shape[1])))
    columns = min(128, max(16, triton.next_power_of_2(extent)))
    many = columns * block_v >= 128 * 64
    if x.stride(0) == 1 and run < 8:
        tokens, many = min(tokens, 32), columns >= 64
    return Tile(tokens, columns, warps=8 if many else 4, stages=4)
