"""y = W x for a weight made of single pseudo-diagonals, differentiable.

The pseudo-diagonal of offset o in an `[O, I]` weight has L = min(O, I) cells: (j, (j + o) mod I)
where O < I, ((j + o) mod O, j) otherwise, j = 0 .. L - 1 (DynaDiag, ICML 2025, appendix A).

Shape letters: T tokens, I and O features in and out, D diagonals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from padst_kernels import Backend
from padst_kernels.calls import needs_operator
from padst_kernels.tiles.passes import (
    MIN_RUN,
    pays_to_transpose,
    readable,
    runs_on_triton,
)

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

    Returns:
        `[..., O]`, dtype of x. Differentiable in `x` and `values`, once and in reverse mode.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or there is no such backend for `x`.
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
    flat, by_row = x.reshape(-1, in_features), out_features < in_features
    arguments = flat, values, offsets, columns, rows, out_features
    if needs_operator(x, values):
        y = _operator(*arguments, by_row, backend)
    elif torch.is_grad_enabled():
        y = _DiagonalMatmul.apply(*arguments, by_row, backend)
    else:
        y = _product(*arguments, by_row, backend)
    return y.view(*x.shape[:-1], out_features)


def _product(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    columns: Tensor | None,
    rows: Tensor | None,
    out_features: int,
    by_row: bool,
    backend: str,
) -> Tensor:
    """`[T, O]` of x `[T, I]`; with O and I, rows and columns, and `by_row` exchanged, dX."""
    if not runs_on_triton(x, backend):
        entries = _entries(offsets, out_features, x.shape[1], columns, rows, by_row)
        dense = values.new_zeros(out_features * x.shape[1])
        dense.scatter_(0, entries.flatten(), values.flatten())
        return x @ dense.view(out_features, -1).t()
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


def _values_gradient(
    x: Tensor,
    dy: Tensor,
    offsets: Tensor,
    columns: Tensor | None,
    rows: Tensor | None,
    by_row: bool,
    backend: str,
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


# The same passes as operators that torch.compile takes as they are.

_operator = torch.library.custom_op("padst::diagonal_matmul", _product, mutates_args=())
_values_gradient_operator = torch.library.custom_op(
    "padst::diagonal_matmul_values_gradient", _values_gradient, mutates_args=()
)


@_operator.register_fake
def _(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[3])


@_values_gradient_operator.register_fake
def _(x: Tensor, dy: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(offsets.shape[0], min(x.shape[1], dy.shape[1]))


class _DiagonalMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        _setup_context(ctx, arguments, arguments[0])
        return _product(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, _product, _values_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    *_, ctx.by_row, ctx.backend = inputs


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, _operator, _values_gradient_operator)


def _gradients(
    ctx: Any,
    dy: Tensor,
    product: Callable[..., Tensor],
    values_gradient: Callable[..., Tensor],
) -> tuple[Tensor | None, ...]:
    x, values, offsets, columns, rows = ctx.saved_tensors
    dx = dvalues = None
    if ctx.needs_input_grad[0]:
        dx = product(dy, values, offsets, rows, columns, x.shape[1], not ctx.by_row, ctx.backend)
    if ctx.needs_input_grad[1]:
        dvalues = values_gradient(x, dy, offsets, columns, rows, ctx.by_row, ctx.backend)
    return dx, dvalues, *(None for _ in range(6))


_operator.register_autograd(_backward, setup_context=_setup_context)
