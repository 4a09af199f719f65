"""y = W x where every row of W has inputs of its own, stored as values and column numbers.

Unstructured weights, textbook N:M, single diagonals and constant fan-in (SRigL; Lasby et al.,
"Dynamic Sparse Training with Structured Sparsity", 2024, section 4). `entry_matmul` trains;
`condensed_matmul`, for inference, takes the condensed form: rows without entries (ablated neurons)
take no storage and no time, and keep their place in y.

Shape letters: T tokens, I and O features in and out, S entries, N rows that have entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from padst_kernels import Backend
from padst_kernels.calls import needs_operator
from padst_kernels.entries import passes
from padst_kernels.entries.index import Condensed, EntryIndex

BACKENDS = ("native", "torch")
CONDENSED_BACKENDS = ("native", "torch", "triton")


def entry_matmul(
    x: Tensor,
    values: Tensor,
    index: EntryIndex,
    out_features: int,
    *,
    backend: Backend = "torch",
) -> Tensor:
    """y = x @ W^T, where W `[O, I]` holds `values` at the entries of `index`, zeros elsewhere.

    Args:
        x: floating point `[..., I]`.
        values: any shape of S elements, dtype of x.
        index: made by `entry_index`.
        out_features: O.
        backend: `"native"`: a compiled kernel, for tensors on a CPU, that multiplies the entries
            alone, with float32 sums. `"torch"`: plain PyTorch, through a dense weight that lives
            only during a pass. float64, more than 65,536 features, and machines without a compiler
            go to `"torch"` all the same.

    Returns:
        `[..., O]`, contiguous, dtype of x. Differentiable in `x` and `values` (zero at padding),
        once and in reverse mode.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or there is no such backend for `x`.
        IndexError: on a CPU, a feature in `index` does not exist.
    """
    if backend not in BACKENDS:
        raise ValueError(f"entry_matmul: backend is {backend!r}, expected one of {BACKENDS}")
    columns = index.columns
    if values.numel() != columns.numel():
        raise ValueError(
            f"entry_matmul: values is {tuple(values.shape)}, expected {columns.numel()} "
            "elements, as many as entries"
        )
    _check("entry_matmul", x, values, columns, index.column_pointer.numel() - 1)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if needs_operator(flat, values):
        y = _product_operator(flat, values, *index, out_features, backend)
    elif torch.is_grad_enabled():
        y = _EntryMatmul.apply(flat, values, *index, out_features, backend)
    else:
        y = passes.product(flat, values, index, out_features, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def condensed_matmul(x: Tensor, weight: Condensed, *, backend: Backend = "torch") -> Tensor:
    """y = x @ W^T, zero where W has no entries.

    Args:
        x: `[..., I]`, dtype of the values.
        weight: made by `condense`.
        backend: `"native"` and `"torch"`: as in `entry_matmul`. `"triton"`: the Triton kernel for
            up to 64 tokens on a GPU; more tokens, and float64, go to `"torch"` all the same.

    Returns:
        `[..., O]`, contiguous. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree, x needs a gradient, or there is no such
            backend for `x`.
        IndexError: on a CPU, a feature in `weight` does not exist.
    """
    values, columns, row_pointer, rows, in_features, out_features = weight
    _check("condensed_matmul", x, values, columns, in_features)
    if backend not in CONDENSED_BACKENDS:
        raise ValueError(
            f"condensed_matmul: backend is {backend!r}, expected one of {CONDENSED_BACKENDS}"
        )
    if values.numel() != columns.numel() or row_pointer.numel() != rows.numel() + 1:
        raise ValueError(
            f"condensed_matmul: {values.numel()} values, {columns.numel()} columns, {rows.numel()} "
            f"rows and {row_pointer.numel()} pointers, expected as many columns as values, one "
            "pointer more than rows"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("condensed_matmul: x requires a gradient, but this is for inference only")
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if needs_operator(flat, values):
        y = _operator(flat, values, columns, row_pointer, rows, out_features, backend)
    else:
        y = passes.condensed_product(flat, weight, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _check(name: str, x: Tensor, values: Tensor, columns: Tensor, in_features: int) -> None:
    if x.shape[-1] != in_features or x.dtype != values.dtype:
        raise ValueError(
            f"{name}: x is {tuple(x.shape)} {x.dtype}, expected {in_features} features of "
            f"{values.dtype}"
        )
    if not x.device == values.device == columns.device:
        raise ValueError(
            f"{name}: x is on {x.device}, values on {values.device}, columns on {columns.device}"
        )


@torch.library.custom_op("padst::condensed_matmul", mutates_args=())
def _operator(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_pointer: Tensor,
    rows: Tensor,
    out_features: int,
    backend: str,
) -> Tensor:
    weight = Condensed(values, columns, row_pointer, rows, x.shape[1], out_features)
    return passes.condensed_product(x, weight, backend)


@_operator.register_fake
def _(x: Tensor, values: Tensor, columns: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[-2])


class _EntryMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, *rest: Any) -> Tensor:
        *fields, out_features, ctx.backend = rest
        index = EntryIndex(*fields)
        ctx.save_for_backward(x, values, *index)
        return passes.product(x, values, index, out_features, ctx.backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *rest = ctx.saved_tensors
        index = EntryIndex(*rest)
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = passes.input_gradient(dy, values, index, ctx.backend)
        if ctx.needs_input_grad[1]:
            dvalues = passes.values_gradient(x, dy, index, ctx.backend).view(values.shape)
        return dx, dvalues, *(None for _ in index), None, None


# The same passes as operators that torch.compile takes as they are.


@torch.library.custom_op("padst::entry_matmul", mutates_args=())
def _product_operator(
    x: Tensor,
    values: Tensor,
    row_pointer: Tensor,
    columns: Tensor,
    order: Tensor | None,
    column_pointer: Tensor,
    rows: Tensor,
    slots: Tensor,
    out_features: int,
    backend: str,
) -> Tensor:
    index = EntryIndex(row_pointer, columns, order, column_pointer, rows, slots)
    return passes.product(x, values, index, out_features, backend)


@_product_operator.register_fake
def _(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[-2])


@torch.library.custom_op("padst::entry_matmul_input_gradient", mutates_args=())
def _input_gradient_operator(
    dy: Tensor,
    values: Tensor,
    row_pointer: Tensor,
    columns: Tensor,
    order: Tensor | None,
    column_pointer: Tensor,
    rows: Tensor,
    slots: Tensor,
    backend: str,
) -> Tensor:
    index = EntryIndex(row_pointer, columns, order, column_pointer, rows, slots)
    return passes.input_gradient(dy, values, index, backend)


@_input_gradient_operator.register_fake
def _(dy: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], EntryIndex(*rest[:-1]).column_pointer.shape[0] - 1)


@torch.library.custom_op("padst::entry_matmul_values_gradient", mutates_args=())
def _values_gradient_operator(
    x: Tensor,
    dy: Tensor,
    row_pointer: Tensor,
    columns: Tensor,
    order: Tensor | None,
    column_pointer: Tensor,
    rows: Tensor,
    slots: Tensor,
    backend: str,
) -> Tensor:
    index = EntryIndex(row_pointer, columns, order, column_pointer, rows, slots)
    return passes.values_gradient(x, dy, index, backend)


@_values_gradient_operator.register_fake
def _(x: Tensor, dy: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(EntryIndex(*rest[:-1]).columns.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-2])
    ctx.backend = inputs[-1]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, *index = ctx.saved_tensors
    dx = dvalues = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient_operator(dy, values, *index, ctx.backend)
    if ctx.needs_input_grad[1]:
        dvalues = _values_gradient_operator(x, dy, *index, ctx.backend).view(values.shape)
    return dx, dvalues, *(None for _ in index), None, None


_product_operator.register_autograd(_backward, setup_context=_setup_context)
