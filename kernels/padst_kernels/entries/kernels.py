"""Triton kernel of condensed weights for few tokens, and its launcher: tensors in, tensors out.

    launch_condensed(x, values, columns, row_pointer, rows, out_features) -> y [O, T]

Shape letters: T tokens, I and O features in and out, S entries, N rows that have entries.
Activations are `[features, T]` views, feature-major or token-major, see activations.py.
Rows share no columns, so there is nothing for matrix instructions, and with few tokens the bytes of
the weight are what counts: each is read once for up to 16 tokens, x comes from a cache.
"""

# Arguments of Triton kernels have no Python types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from padst_kernels.activations import readable_tokens
from padst_kernels.devices import on_its_device


@triton.jit
def _products(
    x,
    value,
    column,
    inside,
    t,
    in_features,
    x_tokens,
    x_feature_stride,
    x_token_stride,
):
    inside = inside & (column < in_features)
    x_tile = tl.load(
        x + column.to(tl.int64)[:, :, None] * x_feature_stride + t[None, None, :] * x_token_stride,
        mask=inside[:, :, None] & (t < x_tokens)[None, None, :],
        other=0.0,
    )
    value = tl.where(inside, value.to(tl.float32), 0.0)
    return value[:, :, None] * x_tile.to(tl.float32)


@triton.jit
def _condensed_kernel(
    x,
    values,
    columns,
    row_pointer,
    rows,
    y,
    in_features,
    out_features,
    num_rows,
    num_entries,
    x_tokens,
    y_tokens,
    x_feature_stride,
    x_token_stride,
    y_feature_stride,
    y_token_stride,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    first = tl.load(row_pointer + r, mask=r < num_rows, other=0)[:, None]
    last = tl.load(row_pointer + r + 1, mask=r < num_rows, other=0)[:, None]
    # Rows begin anywhere. Loads begin at whole vectors and are masked by whole vectors, which keeps
    # them wide; what they read of other rows is not used.
    begin = first // VECTOR * VECTOR
    whole = num_entries // VECTOR * VECTOR
    sums = tl.zeros((BLOCK_R, BLOCK_K, BLOCK_T), tl.float32)
    for step in range(0, tl.max(last - begin), BLOCK_K):
        entry = begin + (step + tl.arange(0, BLOCK_K))[None, :]
        sums += _products(
            x,
            tl.load(values + entry, mask=entry < whole, other=0.0),
            tl.load(columns + entry, mask=entry < whole, other=0).to(tl.int32),
            (entry >= first) & (entry < last) & (entry < whole),
            t,
            in_features,
            x_tokens,
            x_feature_stride,
            x_token_stride,
        )
    total = tl.sum(sums, 1)
    if tl.max(last) > whole:
        entry = whole + tl.arange(0, VECTOR)[None, :]
        inside = (entry >= first) & (entry < last)
        rest = _products(
            x,
            tl.load(values + entry, mask=entry < num_entries, other=0.0),
            tl.load(columns + entry, mask=entry < num_entries, other=0).to(tl.int32),
            inside,
            t,
            in_features,
            x_tokens,
            x_feature_stride,
            x_token_stride,
        )
        total += tl.sum(rest, 1)
    row = tl.load(rows + r, mask=r < num_rows, other=out_features)
    tl.store(
        y + row.to(tl.int64)[:, None] * y_feature_stride + t[None, :] * y_token_stride,
        total.to(y.dtype.element_ty),
        mask=(row < out_features)[:, None] & (t < y_tokens)[None, :],
    )


@on_its_device
def launch_condensed(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_pointer: Tensor,
    rows: Tensor,
    out_features: int,
) -> Tensor:
    """y[rows[r]] = sum of values[k] x[columns[k]] over the entries k of row r; zero elsewhere.

    Args:
        x: `[I, T]` view, float32, bfloat16 or float16. Feature-major reads wider.
        values: `[S]`, dtype of x.
        columns: uint16 or int32 `[S]`; entries of a feature that x lacks count for nothing.
        row_pointer: int32 `[N + 1]`, entries of row r are row_pointer[r] to row_pointer[r + 1].
        rows: int32 `[N]`, distinct.
        out_features: O.

    Returns:
        `[O, T]`, token-major, dtype of x. Sums are in float32.

    Raises:
        ValueError: `x` is neither token-major nor aligned.
    """
    in_features, num_tokens = x.shape
    # Rows without entries are not computed.
    empty = x.new_empty if len(rows) == out_features else x.new_zeros
    y = empty(num_tokens, out_features).t()
    x_tokens = readable_tokens("x", x)
    if num_tokens == 0 or len(rows) == 0:
        return y
    # A program computes `block_r` rows of `block_t` tokens, `block_k` entries of a row in a step: a
    # thread of the first two reads eight neighbouring values, and their columns, at once. Chosen
    # from compiled code, not measured.
    if num_tokens == 1:
        block_r, block_k, block_t, warps = 4, 128, 1, 2
    elif num_tokens <= 4:
        block_r, block_k, block_t, warps = 4, 64, 4, 1
    elif num_tokens <= 8:
        block_r, block_k, block_t, warps = 4, 64, 8, 2
    else:
        block_r, block_k, block_t, warps = 4, 32, 16, 4
    grid = triton.cdiv(len(rows), block_r), triton.cdiv(num_tokens, block_t)
    _condensed_kernel[grid](
        x,
        values,
        columns,
        row_pointer,
        rows,
        y,
        in_features,
        out_features,
        len(rows),
        len(values),
        x_tokens,
        num_tokens,
        *x.stride(),
        *y.stride(),
        VECTOR=8,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        BLOCK_T=block_t,
        num_warps=warps,
    )
    return y
