"""The passes of cpu.cpp: C++ that multiplies entry by entry.

Each returns None where there is no such kernel: in float64, beyond 65,536 features, and without a
compiler. Shape letters as in op.py; x `[T, I]`, dy `[T, O]`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from padst_kernels.compiled import compiled
from padst_kernels.entries.index import EntryIndex

_UINT16 = torch.uint16
_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# How many pointers each pass takes.
_PASSES = {"": 8, "dx_": 10, "dvalues_": 7}

# T, I, O, rows, entries.
_Sizes = ctypes.c_int64 * 5


def product(x: Tensor, values: Tensor, index: EntryIndex, out_features: int) -> Tensor | None:
    """`[T, O]`, contiguous."""
    columns = index.columns
    # numel: len of a tensor takes longer than all the rest.
    sizes = *x.shape, out_features, out_features, columns.numel()
    tensors = x.contiguous(), values.contiguous(), *index[:3], None
    return _run("", tensors, (columns,), sizes, x.new_empty(sizes[0], out_features))


def input_gradient(dy: Tensor, values: Tensor, index: EntryIndex) -> Tensor | None:
    """`[T, I]`, contiguous."""
    num_tokens, out_features = dy.shape
    in_features = index.in_features
    sizes = num_tokens, in_features, out_features, out_features, index.slots.numel()
    tensors = dy.contiguous(), values.contiguous(), *index
    features = index.columns, index.rows
    return _run("dx_", tensors, features, sizes, dy.new_empty(num_tokens, in_features))


def values_gradient(x: Tensor, dy: Tensor, index: EntryIndex) -> Tensor | None:
    """`[S]`, zero at padding."""
    num_entries = index.slots.numel()
    sizes = *x.shape, dy.shape[1], dy.shape[1], num_entries
    tensors = x.contiguous(), dy.contiguous(), *index[:3]
    return _run("dvalues_", tensors, (index.columns,), sizes, x.new_empty(num_entries))


def condensed_product(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_pointer: Tensor,
    rows: Tensor,
    out_features: int,
) -> Tensor | None:
    """`[T, O]`, contiguous."""
    sizes = *x.shape, out_features, rows.numel(), columns.numel()
    tensors = x.contiguous(), values.contiguous(), row_pointer, columns, None, rows
    return _run("", tensors, (columns,), sizes, x.new_empty(sizes[0], out_features))


def _run(
    name: str,
    tensors: tuple[Tensor | None, ...],
    features: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    out: Tensor,
) -> Tensor | None:
    """`out`, filled by one pass that reads `tensors`; it takes no `features` but uint16."""
    if not out.is_cpu:
        raise ValueError(f"backend 'native' needs a CPU, got a tensor on {out.device}")
    function = functions().get((name, out.dtype))
    if function is None:
        return None
    for tensor in features:
        if tensor.dtype is not _UINT16:
            return None
    legal = function(
        *[None if t is None else t.data_ptr() for t in tensors], _Sizes(*sizes), out.data_ptr()
    )
    if not legal:
        raise IndexError(f"entries: an index is out of range for activations {sizes[:2]}")
    return out


@functools.cache
def functions() -> dict[tuple[str, torch.dtype], Callable[..., bool]]:
    """The passes by name and dtype; none without a compiler."""
    library = compiled(Path(__file__).with_name("cpu.cpp"))
    found = {}
    for name, dtype in itertools.product(_PASSES, _TYPES) if library is not None else ():
        function = getattr(library, f"padst_entries_{name}{_TYPES[dtype]}")
        function.argtypes = [ctypes.c_void_p] * _PASSES[name]
        function.restype = ctypes.c_bool
        found[name, dtype] = function
    return found
