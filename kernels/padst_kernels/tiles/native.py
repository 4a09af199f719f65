"""The three passes of cpu.cpp: C++ that reads rows of x by index, without a gathered copy.

Each returns None where there is no such kernel: in float64, and without a compiler.
Shape letters as in op.py; x `[T, I]`, dy `[T, O]`, weight `[G, K, V]`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from padst_kernels.compiled import compiled
from padst_kernels.tiles.index import TileIndex

# Passes and element types, as cpu.cpp numbers them.
_PRODUCT, _INPUT_GRADIENT, _WEIGHT_GRADIENT = range(3)
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def product(x: Tensor, weight: Tensor, index: TileIndex, out_features: int) -> Tensor | None:
    """`[T, O]`, contiguous."""
    y = x.new_empty(x.shape[0], out_features)
    return _run(_PRODUCT, x, weight, y, index, x.shape, out_features, weight.shape)


def input_gradient(dy: Tensor, weight: Tensor, index: TileIndex) -> Tensor | None:
    """`[T, I]`, contiguous."""
    dx = dy.new_empty(dy.shape[0], index.in_features)
    return _run(_INPUT_GRADIENT, dy, weight, dx, index, dx.shape, dy.shape[1], weight.shape)


def weight_gradient(x: Tensor, dy: Tensor, index: TileIndex, height: int) -> Tensor | None:
    """`[G, K, V]`, contiguous."""
    dweight = x.new_empty(*index.columns.shape, height)
    return _run(_WEIGHT_GRADIENT, x, dy, dweight, index, x.shape, dy.shape[1], dweight.shape)


def _run(
    which: int,
    first: Tensor,
    second: Tensor,
    out: Tensor,
    index: TileIndex,
    x_shape: torch.Size,
    out_features: int,
    weight_shape: torch.Size,
) -> Tensor | None:
    """`out`, filled by one pass of cpu.cpp."""
    if not out.is_cpu:
        raise ValueError(f"backend 'native' needs a CPU, got a tensor on {out.device}")
    element = _TYPES.get(out.dtype)
    function = None if element is None else library()
    if function is None:
        return None
    # Named as long as their memory is in use.
    first, second = first.contiguous(), second.contiguous()
    columns, rows, row_pointer, order = index[:4]
    num_tiles, width, height = weight_shape
    legal = function(
        which,
        element,
        first.data_ptr(),
        second.data_ptr(),
        out.data_ptr(),
        columns.data_ptr(),
        None if rows is None else rows.data_ptr(),
        None if row_pointer is None else row_pointer.data_ptr(),
        None if order is None else order.data_ptr(),
        *x_shape,
        out_features,
        num_tiles,
        width,
        height,
        num_tiles if row_pointer is None else row_pointer.shape[0] - 1,
    )
    if not legal:
        raise IndexError(
            f"tile_matmul: an index is out of range for x {tuple(x_shape)}, "
            f"weight {tuple(weight_shape)} and {out_features} features out"
        )
    return out


@functools.cache
def library() -> Callable[..., bool] | None:
    """`padst_tile_matmul` of cpu.cpp, or None without a compiler."""
    loaded = compiled(Path(__file__).with_name("cpu.cpp"))
    if loaded is None:
        return None
    function = loaded.padst_tile_matmul
    numbers, pointers = [ctypes.c_int64], [ctypes.c_void_p]
    function.argtypes = [*numbers * 2, *pointers * 7, *numbers * 7]
    function.restype = ctypes.c_bool
    return function
