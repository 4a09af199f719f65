"""y = W x where every row of W has inputs of its own, stored as values and column numbers.

Constant fan-in (Lasby et al., "Dynamic Sparse Training with Structured Sparsity", 2024, section
4), textbook N:M and unstructured weights. Rows without entries (ablated neurons) take no storage
and no time, and keep their place in y. Inference only: training goes through `scatter_linear`.

Shape letters: T tokens, I and O features in and out, S entries, N rows that have entries.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from padst_kernels.compiled import compiled

# Tokens that plain PyTorch sums at a time: their features stay in a cache.
TOKENS = 64


class FanIn(NamedTuple):
    """A condensed weight.

    Attributes:
        values: `[S]`, row by row.
        columns: `[S]`, the input of each value; uint16 where I allows it, else int32.
        row_pointer: int32 `[N + 1]`, where each row begins.
        rows: int32 `[N]`, ascending, the feature of y that each row computes.
        in_features: I.
        out_features: O.
    """

    values: Tensor
    columns: Tensor
    row_pointer: Tensor
    rows: Tensor
    in_features: int
    out_features: int


def condense(values: Tensor, entries: Tensor, out_features: int, in_features: int) -> FanIn:
    """Condense a weight `[O, I]` that holds `values` at flat `entries` and zeros elsewhere.

    Args:
        values: any shape. Detached.
        entries: int64, shape of `values`; row * I + column, distinct, or O * I for padding.
        out_features: O.
        in_features: I.
    """
    entries, order = entries.flatten().sort()
    inside = int((entries < out_features * in_features).sum())
    entries, order = entries[:inside], order[:inside]
    counts = torch.bincount(entries // in_features, minlength=out_features)
    rows = counts.nonzero().squeeze(1)
    row_pointer = torch.zeros(len(rows) + 1, dtype=torch.int32, device=values.device)
    row_pointer[1:] = counts[rows].cumsum(0)
    narrow = torch.uint16 if in_features <= 1 << 16 else torch.int32
    return FanIn(
        values=values.detach().flatten()[order].contiguous(),
        columns=(entries % in_features).to(narrow),
        row_pointer=row_pointer,
        rows=rows.int(),
        in_features=in_features,
        out_features=out_features,
    )


def fan_in_linear(x: Tensor, weight: FanIn) -> Tensor:
    """y = x @ W^T, zero where W has no entries.

    Args:
        x: `[..., I]`, dtype of the values.
        weight: made by `condense`.

    Returns:
        `[..., O]`, contiguous. Not differentiable.

    Raises:
        ValueError: shape or dtype of x disagree with the weight, or x needs a gradient.
    """
    if x.shape[-1] != weight.in_features or x.dtype != weight.values.dtype:
        raise ValueError(
            f"fan_in_linear: x is {tuple(x.shape)} {x.dtype}, expected {weight.in_features} "
            f"features of {weight.values.dtype}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("fan_in_linear: x requires a gradient, but this is for inference only")
    # In eager mode the operator itself would take as long as a small product.
    run = _operator if torch.compiler.is_compiling() else _fan_in
    y = run(x.reshape(-1, x.shape[-1]), *weight[:4], weight.out_features)
    return y.view(*x.shape[:-1], weight.out_features)


def _fan_in(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_pointer: Tensor,
    rows: Tensor,
    out_features: int,
) -> Tensor:
    y = x.new_zeros(len(x), out_features)
    supported = x.device.type == "cpu" and x.dtype == torch.float32
    library = _library() if supported and columns.dtype == torch.uint16 else None
    if library is not None:
        x = x.contiguous()
        sizes = (*x.shape, out_features, len(rows), len(values))
        library.padst_fan_in(
            *(t.data_ptr() for t in (x, values, columns, row_pointer, rows)),
            (ctypes.c_int64 * 5)(*sizes),
            y.data_ptr(),
        )
    elif len(x) and len(rows):
        columns = columns.int()
        for part, out in zip(x.split(TOKENS), y.split(TOKENS), strict=True):
            sums = torch.nn.functional.embedding_bag(
                columns,
                part.t().contiguous(),
                row_pointer,
                mode="sum",
                per_sample_weights=values,
                include_last_offset=True,
            )
            out.index_copy_(1, rows.long(), sums.t())
    return y


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiled(Path(__file__).with_name("cpu.cpp"))
    if library is not None:
        library.padst_fan_in.argtypes = [ctypes.c_void_p] * 7
        library.padst_fan_in.restype = None
    return library


_operator = torch.library.custom_op("padst::fan_in", _fan_in, mutates_args=())


@_operator.register_fake
def _(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_pointer: Tensor,
    rows: Tensor,
    out_features: int,
) -> Tensor:
    return x.new_empty(len(x), out_features)
