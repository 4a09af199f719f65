"""Triton kernels for weights made of single pseudo-diagonals, and their launchers.

    launch_diagonals(x, values, offsets, out_features, *, by_row, columns, rows, feature_major)
        -> y [O, T]
    launch_diagonals_gradient(x, dy, offsets, *, by_row, columns, rows) -> dvalues [D, L]

Shape letters: T tokens, I and O features in and out, D diagonals, L = min(O, I) cells of each.
Diagonal d of offset o has cells j = 0 .. L - 1 at (j, (j + o) mod I) where `by_row`, which needs
O <= I, and at ((j + o) mod O, j) where not, which needs O >= I. A weight `[O, I]` is stored by row
where O < I, by column otherwise. Its transpose has the same offsets and values and the other
`by_row`, so dX is `launch_diagonals` on dY, with I and O, and `rows` and `columns`, exchanged.

Activations are `[features, T]` views, feature-major or token-major, see activations.py.
Neighbouring rows of randomly placed diagonals share no columns, so there is nothing for matrix
instructions: the products run on CUDA cores, and every x is read D times, through L2.
"""

# Arguments of Triton kernels have no Python types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from padst_kernels.activations import empty_features, readable_tokens
from padst_kernels.devices import on_its_device


@triton.jit
def _diagonals_kernel(
    x,
    values,
    offsets,
    columns,
    rows,
    y,
    num_diagonals,
    in_features,
    out_features,
    x_tokens,
    y_tokens,
    x_feature_stride,
    x_token_stride,
    y_feature_stride,
    y_token_stride,
    BY_ROW: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # Rows are the fastest axis: x of a token tile stays in L2 for all of them.
    num_blocks = tl.cdiv(out_features, BLOCK_O)
    row = tl.program_id(0) % num_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(0) // num_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    num_cells = tl.minimum(in_features, out_features)
    x += t.to(tl.int64)[None, :] * x_token_stride
    acc = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for d in range(num_diagonals):
        offset = tl.load(offsets + d)
        if BY_ROW:
            cell = row
            column = (row + offset) % in_features
        else:
            cell = (row + out_features - offset) % out_features
            column = cell
        # By column, rows that a diagonal does not reach have a cell beyond its last one.
        inside = (row < out_features) & (cell < num_cells)
        value = tl.load(values + cell, mask=inside, other=0.0)
        if columns is not None:
            column = tl.load(columns + column, mask=inside, other=0)
        x_tile = tl.load(
            x + column.to(tl.int64)[:, None] * x_feature_stride,
            mask=inside[:, None] & (t < x_tokens)[None, :],
            other=0.0,
        )
        acc += value.to(tl.float32)[:, None] * x_tile.to(tl.float32)
        values += num_cells
    feature = row
    if rows is not None:
        feature = tl.load(rows + row, mask=row < out_features, other=0)
    y += feature.to(tl.int64)[:, None] * y_feature_stride + t.to(tl.int64)[None, :] * y_token_stride
    mask = (row < out_features)[:, None] & (t < y_tokens)[None, :]
    tl.store(y, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _diagonals_gradient_kernel(
    x,
    dy,
    offsets,
    columns,
    rows,
    dvalues,
    in_features,
    out_features,
    num_tokens,
    x_tokens,
    dy_tokens,
    x_feature_stride,
    x_token_stride,
    dy_feature_stride,
    dy_token_stride,
    BY_ROW: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    num_cells = tl.minimum(in_features, out_features)
    cell = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    d = tl.program_id(1)
    inside = cell < num_cells
    offset = tl.load(offsets + d)
    if BY_ROW:
        row = cell
        column = (cell + offset) % in_features
    else:
        row = (cell + offset) % out_features
        column = cell
    if columns is not None:
        column = tl.load(columns + column, mask=inside, other=0)
    if rows is not None:
        row = tl.load(rows + row, mask=inside, other=0)
    x += column.to(tl.int64)[:, None] * x_feature_stride
    dy += row.to(tl.int64)[:, None] * dy_feature_stride
    acc = tl.zeros((BLOCK_L, BLOCK_T), tl.float32)
    for start in range(0, num_tokens, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
        x_mask = inside[:, None] & (t < x_tokens)
        x_tile = tl.load(x + t * x_token_stride, mask=x_mask, other=0.0).to(tl.float32)
        dy_mask = inside[:, None] & (t < dy_tokens)
        dy_tile = tl.load(dy + t * dy_token_stride, mask=dy_mask, other=0.0).to(tl.float32)
        # Padding may hold anything.
        acc += tl.where(t < num_tokens, x_tile * dy_tile, 0.0)
    total = tl.sum(acc, 1).to(dvalues.dtype.element_ty)
    tl.store(dvalues + d.to(tl.int64) * num_cells + cell, total, mask=inside)


@on_its_device
def launch_diagonals(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    out_features: int,
    *,
    by_row: bool,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    feature_major: bool = True,
) -> Tensor:
    """y[rows[r]] = sum over the cells (r, c) of all diagonals of their value * x[columns[c]].

    Args:
        x: `[I, T]` view, float32, bfloat16 or float16.
        values: `[D, L]`, contiguous, any floating point.
        offsets: int32 `[D]`, in [0, max(O, I)).
        out_features: O.
        by_row: which side counts the cells, see the module.
        columns: int32 `[I]`, permutation of the inputs, or None.
        rows: int32 `[O]`, permutation of the outputs, or None.
        feature_major: layout of y.

    Returns:
        `[O, T]` view, dtype of x.

    Raises:
        ValueError: a feature-major activation is not aligned.
    """
    in_features, num_tokens = x.shape
    assert values.is_contiguous() and values.shape[1] == min(in_features, out_features)
    assert out_features <= in_features if by_row else out_features >= in_features
    y = empty_features(out_features, num_tokens, x, feature_major)
    block_o, block_t = _block_sizes(x)
    # One axis: the others of CUDA end at 65,535.
    _diagonals_kernel[(triton.cdiv(out_features, block_o) * triton.cdiv(num_tokens, block_t),)](
        x,
        values,
        *_contiguous(offsets, columns, rows),
        y,
        len(offsets),
        in_features,
        out_features,
        readable_tokens("x", x),
        readable_tokens("y", y),
        *x.stride(),
        *y.stride(),
        BY_ROW=by_row,
        BLOCK_O=block_o,
        BLOCK_T=block_t,
        num_warps=4,
    )
    return y


@on_its_device
def launch_diagonals_gradient(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    *,
    by_row: bool,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """dvalues[d, j] = sum over t of dy[rows[r], t] * x[columns[c], t], (r, c) cell j of diagonal d.

    Args:
        x: `[I, T]` view.
        dy: `[O, T]` view.
        offsets: int32 `[D]`.
        by_row: as in `launch_diagonals`.
        columns: int32 `[I]`, or None.
        rows: int32 `[O]`, or None.

    Returns:
        `[D, L]`, dtype of x.

    Raises:
        ValueError: a feature-major activation is not aligned.
    """
    in_features, num_tokens = x.shape
    out_features = len(dy)
    num_cells = min(in_features, out_features)
    dvalues = x.new_empty(len(offsets), num_cells)
    block_l, block_t = _block_sizes(x)
    _diagonals_gradient_kernel[triton.cdiv(num_cells, block_l), len(offsets)](
        x,
        dy,
        *_contiguous(offsets, columns, rows),
        dvalues,
        in_features,
        out_features,
        num_tokens,
        readable_tokens("x", x),
        readable_tokens("dy", dy),
        *x.stride(),
        *dy.stride(),
        BY_ROW=by_row,
        BLOCK_L=block_l,
        BLOCK_T=block_t,
        num_warps=4,
    )
    return dvalues


def _contiguous(*indices: Tensor | None) -> list[Tensor | None]:
    return [None if index is None else index.contiguous() for index in indices]


def _block_sizes(x: Tensor) -> tuple[int, int]:
    """Features and tokens of a program's tile, long where x is contiguous."""
    if x.stride(0) == 1:
        return 128, 16
    return 16, min(256, max(16, triton.next_power_of_2(x.shape[1])))
