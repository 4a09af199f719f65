"""y = W x where every row of W has inputs of its own, stored as values and column numbers.

Unstructured weights, textbook N:M, single diagonals and constant fan-in (SRigL; Lasby et al.,
"Dynamic Sparse Training with Structured Sparsity", 2024, section 4). `entry_matmul` trains;
`condensed_matmul`, for inference, takes the condensed form: rows without entries (ablated neurons)
take no storage and no time, and keep their place in y.

Shape letters: T tokens, I and O features in and out, S entries, N rows that have entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padst_kernels.backends import Backend
from padst_kernels.calls import operator
from padst_kernels.checks import Part, require_index
from padst_kernels.entries import passes
from padst_kernels.entries.index import Condensed, EntryIndex

BACKENDS = ("native", "torch")
_FEATURES = (torch.uint16, torch.int32)
CONDENSED_BACKENDS = ("native", "torch", "triton")


def entry_matmul(
    x: Tensor,
    values: Tensor,
    index: EntryIndex,
    out_features: int,
    *,
    backend: Backend = "torch",
    trusted: bool = False,
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
        trusted: `index` is as `entry_index` made it, so that no call looks at its numbers.

    Returns:
        `[..., O]`, contiguous, dtype of x. Differentiable in `x` and `values` (zero at padding),
        once and in reverse mode.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or there is no such backend for `x`.
        IndexError: a number in `index` is out of range.
    """
    if backend not in BACKENDS:
        raise ValueError(f"entry_matmul: backend is {backend!r}, expected one of {BACKENDS}")
    columns = index.columns
    if values.numel() != columns.numel():
        raise ValueError(
            f"entry_matmul: values is {tuple(values.shape)}, expected {columns.numel()} "
            "elements, as many as entries"
        )
    _check("entry_matmul", x, values, columns, index.in_features)
    if not trusted:
        _require_entries(index, out_features)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = _product(flat, values, index, out_features, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def condensed_matmul(
    x: Tensor, weight: Condensed, *, backend: Backend = "torch", trusted: bool = False
) -> Tensor:
    """y = x @ W^T, zero where W has no entries.

    Args:
        x: `[..., I]`, dtype of the values.
        weight: made by `condense`.
        backend: `"native"` and `"torch"`: as in `entry_matmul`. `"triton"`: the Triton kernel for
            up to 64 tokens on a GPU; more tokens, and float64, go to `"torch"` all the same.
        trusted: `weight` is as `condense` made it, so that no call looks at its numbers.

    Returns:
        `[..., O]`, contiguous. Not differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree, x needs a gradient, or there is no such
            backend for `x`.
        IndexError: a number in `weight` is out of range.
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
    if not trusted:
        size, last, device = columns.numel(), out_features - 1, x.device
        pointers: list[Part] = [("row_pointer", row_pointer, (rows.numel() + 1,), size, True)]
        pointers.append(("rows", rows, (rows.numel(),), last, True))
        require_index("condensed_matmul", pointers, device)
        features: Part = ("columns", columns, (size,), in_features - 1, False)
        require_index("condensed_matmul", [features], device, _FEATURES)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("condensed_matmul: x requires a gradient, but this is for inference only")
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = _condensed_product(flat, values, columns, row_pointer, rows, out_features, backend)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _require_entries(index: EntryIndex, out_features: int) -> None:
    size, in_features = index.columns.numel(), index.in_features
    pointers: list[Part] = [
        ("row_pointer", index.row_pointer, (out_features + 1,), size, True),
        ("order", index.order, (size,), size - 1, False),
        ("column_pointer", index.column_pointer, (in_features + 1,), size, True),
        ("slots", index.slots, (size,), size - 1, False),
    ]
    features: list[Part] = [
        ("columns", index.columns, (size,), in_features - 1, False),
        ("rows", index.rows, (size,), out_features - 1, False),
    ]
    require_index("entry_matmul", pointers, index.columns.device)
    require_index("entry_matmul", features, index.columns.device, _FEATURES)


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


def _gradients(
    needed: Sequence[bool],
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    index: EntryIndex,
    out_features: int,
    backend: Backend,
) -> tuple[Tensor | None, ...]:
    """Of x and values."""
    dx = _input_gradient(dy, values, index, backend) if needed[0] else None
    dvalues = _values_gradient(x, dy, index, backend) if needed[1] else None
    if dvalues is not None and values.dim() != 1:
        dvalues = dvalues.view(values.shape)
    return dx, dvalues


_product = operator(
    "entry_matmul",
    passes.product,
    lambda x, values, index, out_features, backend: x.new_empty(x.shape[0], out_features),
    gradients=_gradients,
)
_input_gradient = operator(
    "entry_matmul_input_gradient",
    passes.input_gradient,
    lambda dy, values, index, backend: dy.new_empty(dy.shape[0], index.in_features),
)
_values_gradient = operator(
    "entry_matmul_values_gradient",
    passes.values_gradient,
    lambda x, dy, index, backend: x.new_empty(index.columns.shape[0]),
)
_condensed_product = operator(
    "condensed_matmul",
    passes.condensed_product,
    lambda x, *rest: x.new_empty(x.shape[0], rest[-2]),
)
