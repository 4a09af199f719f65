"""y = W x for a weight made of single pseudo-diagonals, differentiable.

The pseudo-diagonal of offset o in an `[O, I]` weight has L = min(O, I) cells: (j, (j + o) mod I)
where O < I, ((j + o) mod O, j) otherwise, j = 0 .. L - 1 (DynaDiag, ICML 2025, appendix A).

Shape letters: T tokens, I and O features in and out, D diagonals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padst_kernels.backends import Backend
from padst_kernels.calls import operator
from padst_kernels.checks import Part, require_index
from padst_kernels.devices import MIN_RUN, pays_to_transpose, readable, runs_on_triton
from padst_kernels.scatter import scatter_matmul

BACKENDS = ("torch", "triton")


def diagonal_matmul(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    out_features: int,
    *,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    backend: Backend = "torch",
    trusted: bool = False,
) -> Tensor:
    """y[..., rows[r]] = sum over cells (r, c) of the diagonals of their value * x[..., columns[c]].

    Args:
        x: floating point `[..., I]`.
        values: `[D, L]`, dtype of x, along each diagonal.
        offsets: int32 `[D]`, distinct, in [0, max(O, I)).
        out_features: O.
        columns: int32 `[I]`, a permutation of the inputs; None for the identity.
        rows: int32 `[O]`, a permutation of the outputs; None for the identity.
        backend: `"torch"`: a dense weight that lives only during a pass. `"triton"`: the Triton
            kernels, for tensors on a GPU; float64 goes to `"torch"` all the same.
        trusted: offsets, columns and rows are as promised, so that no call looks at their numbers.

    Returns:
        `[..., O]`, dtype of x. Differentiable in `x` and `values`, once and in reverse mode.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or there is no such backend for `x`.
        IndexError: an offset, a column or a row is out of range.
    """
    in_features = x.shape[-1]
    if backend not in BACKENDS:
        raise ValueError(f"diagonal_matmul: backend is {backend!r}, expected one of {BACKENDS}")
    if x.dtype != values.dtype:
        raise ValueError(
            f"diagonal_matmul: x is {x.dtype}, expected the dtype of values {values.dtype}"
        )
    for name, tensor, shape in (
        ("values", values, (offsets.shape[0], min(in_features, out_features))),
        ("offsets", offsets, offsets.shape),
        ("columns", columns, (in_features,)),
        ("rows", rows, (out_features,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"diagonal_matmul: {name} is {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"diagonal_matmul: {name} is on {tensor.device}, x on {x.device}")
    if not trusted:
        number, longest = offsets.numel(), max(in_features, out_features)
        parts: list[Part] = [
            ("offsets", _contiguous(offsets), (number,), longest - 1, False),
            ("columns", _contiguous(columns), (in_features,), in_features - 1, False),
            ("rows", _contiguous(rows), (out_features,), out_features - 1, False),
        ]
        require_index("diagonal_matmul", parts, x.device)
    flat, by_row = x.reshape(-1, in_features), out_features < in_features
    y = _product(flat, values, offsets, columns, rows, out_features, by_row, backend)
    return y.view(*x.shape[:-1], out_features)


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


def product(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    columns: Tensor | None,
    rows: Tensor | None,
    out_features: int,
    by_row: bool,
    backend: Backend,
) -> Tensor:
    """`[T, O]` of x `[T, I]`; with O and I, rows and columns, and `by_row` exchanged, dX."""
    if not runs_on_triton(x, backend):
        entries = _entries(offsets, out_features, x.shape[1], columns, rows, by_row)
        return scatter_matmul(x, values, entries, out_features, trusted=True)
    from padst_kernels.diagonals.kernels import launch_diagonals

    transposes = (columns is not None or rows is not None) and pays_to_transpose(x)
    y = launch_diagonals(
        readable(x, 1 if transposes else MIN_RUN).t(),
        values.contiguous(),
        offsets,
        out_features,
        by_row=by_row,
        columns=columns,
        rows=rows,
        feature_major=transposes,
    ).t()
    return y.contiguous()


def values_gradient(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    columns: Tensor | None,
    rows: Tensor | None,
    by_row: bool,
    backend: Backend,
) -> Tensor:
    """`[D, L]` of x `[T, I]` and dy `[T, O]`."""
    if not runs_on_triton(x, backend):
        entries = _entries(offsets, dy.shape[1], x.shape[1], columns, rows, by_row)
        return (dy.t() @ x).flatten()[entries]
    from padst_kernels.diagonals.kernels import launch_diagonals_gradient

    run = MIN_RUN if columns is None and rows is None else 1
    return launch_diagonals_gradient(
        readable(x, run).t(),
        readable(dy, run).t(),
        offsets,
        by_row=by_row,
        columns=columns,
        rows=rows,
    )


def _entries(
    offsets: Tensor,
    out_features: int,
    in_features: int,
    columns: Tensor | None,
    rows: Tensor | None,
    by_row: bool,
) -> Tensor:
    """Int64 `[D, L]`, row * I + column of every cell."""
    short = torch.arange(min(out_features, in_features), device=offsets.device)
    long = (short + offsets[:, None]) % max(out_features, in_features)
    row, column = (short, long) if by_row else (long, short)
    row = row if rows is None else rows[row]
    column = column if columns is None else columns[column]
    return row.long() * in_features + column


def _gradients(
    needed: Sequence[bool],
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    columns: Tensor | None,
    rows: Tensor | None,
    out_features: int,
    by_row: bool,
    backend: Backend,
) -> tuple[Tensor | None, ...]:
    """Of x and values."""
    dx = dvalues = None
    if needed[0]:
        dx = _product(dy, values, offsets, rows, columns, x.shape[1], not by_row, backend)
    if needed[1]:
        dvalues = _values_gradient(x, dy, offsets, columns, rows, by_row, backend)
    return dx, dvalues


_product = operator(
    "diagonal_matmul",
    product,
    lambda x, *rest: x.new_empty(x.shape[0], rest[-3]),
    gradients=_gradients,
)
_values_gradient = operator(
    "diagonal_matmul_values_gradient",
    values_gradient,
    lambda x, dy, offsets, *_: x.new_empty(len(offsets), min(x.shape[1], dy.shape[1])),
)
