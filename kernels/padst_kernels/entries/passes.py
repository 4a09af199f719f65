"""The passes of a condensed weight: C++ on a CPU (cpu.cpp), plain PyTorch everywhere else.

Without a compiler, in float64, on a GPU, and beyond 65,536 features the values go through a dense
weight that lives only during a pass. Shape letters as in op.py; x `[T, I]`, dy `[T, O]`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from padst_kernels.activations import aligned_features
from padst_kernels.compiled import compiled
from padst_kernels.entries.index import Condensed, EntryIndex
from padst_kernels.scatter import scatter_matmul
from padst_kernels.tiles.passes import runs_on_triton

# Tokens that plain PyTorch sums at a time: their features stay in a cache.
TOKENS = 64
# With more of them the bytes of x and y count, not those of the weight.
MAX_TRITON_TOKENS = 64

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_Sizes = ctypes.c_int64 * 5

# Arguments of each pass in cpu.cpp.
_ARGUMENTS = {"": 8, "dx_": 10, "dvalues_": 7}


def product(
    x: Tensor, values: Tensor, index: EntryIndex, out_features: int, backend: str
) -> Tensor:
    """`[T, O]`, contiguous."""
    sizes = (*x.shape, out_features, out_features, index.columns.numel())
    y = x.new_empty(sizes[0], out_features)
    tensors = x.contiguous(), values.contiguous(), *index[:3], None
    if not _run(backend, "", tensors, (index.columns,), sizes, y):
        y = scatter_matmul(x, values.flatten(), _entries(*index[:3], x.shape[1]), out_features)
    return y


def input_gradient(dy: Tensor, values: Tensor, index: EntryIndex, backend: str) -> Tensor:
    """`[T, I]`, contiguous."""
    sizes = (
        dy.shape[0],
        index.column_pointer.numel() - 1,
        dy.shape[1],
        dy.shape[1],
        index.slots.numel(),
    )
    dx = dy.new_empty(sizes[:2])
    tensors = dy.contiguous(), values.contiguous(), *index
    if not _run(backend, "dx_", tensors, (index.columns, index.rows), sizes, dx):
        transposed = _entries(*index[3:], dy.shape[1])
        dx = scatter_matmul(dy, values.flatten(), transposed, sizes[1])
    return dx


def values_gradient(x: Tensor, dy: Tensor, index: EntryIndex, backend: str) -> Tensor:
    """`[S]`, zero at padding."""
    sizes = x.shape[0], x.shape[1], dy.shape[1], dy.shape[1], index.slots.numel()
    dvalues = x.new_empty(index.slots.numel())
    tensors = x.contiguous(), dy.contiguous(), *index[:3]
    if not _run(backend, "dvalues_", tensors, (index.columns,), sizes, dvalues):
        dense = (dy.t() @ x).flatten()
        dvalues = torch.cat([dense, dense.new_zeros(1)])[_entries(*index[:3], x.shape[1])]
    return dvalues


def condensed_product(x: Tensor, weight: Condensed, backend: str) -> Tensor:
    """`[T, O]`, contiguous."""
    values, columns, row_pointer, rows = weight[:4]
    num_tokens, in_features = x.shape
    num_rows = rows.numel()
    if not num_rows or not num_tokens:
        return x.new_zeros(num_tokens, weight.out_features)
    if runs_on_triton(x, backend) and num_tokens <= MAX_TRITON_TOKENS:
        from padst_kernels.entries import kernels

        # A single token is feature-major either way.
        x = x.contiguous().t() if num_tokens <= 1 else aligned_features(x)
        return kernels.launch_condensed(x, *weight[:4], weight.out_features).t()
    y = x.new_empty(num_tokens, weight.out_features)
    # numel: len of a tensor takes longer than all the rest.
    sizes = num_tokens, in_features, weight.out_features, num_rows, columns.numel()
    tensors = x.contiguous(), values.contiguous(), row_pointer, columns, None, rows
    if _run(backend, "", tensors, (columns,), sizes, y):
        return y
    y.zero_()
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


def _run(
    backend: str,
    name: str,
    tensors: tuple[Tensor | None, ...],
    features: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    out: Tensor,
) -> bool:
    """Run one pass of cpu.cpp into `out`; False where there is none for these tensors."""
    if backend != "native":
        return False
    if not out.is_cpu:
        raise ValueError(f"backend 'native' needs a CPU, got a tensor on {out.device}")
    function = _functions().get((name, out.dtype))
    if function is None or [t for t in features if t.dtype != torch.uint16]:
        return False
    legal = function(
        *[None if t is None else t.data_ptr() for t in tensors], _Sizes(*sizes), out.data_ptr()
    )
    if not legal:
        raise IndexError(f"entries: an index is out of range for activations {sizes[:2]}")
    return True


def _entries(pointer: Tensor, columns: Tensor, order: Tensor | None, in_features: int) -> Tensor:
    """Flat entries in the order of the values, int64 `[S]`."""
    places = torch.arange(len(columns), dtype=torch.int32, device=columns.device)
    # Padding counts as row O, column 0.
    rows = torch.searchsorted(pointer, places, right=True) - 1
    columns = columns.long()
    if columns.is_cpu and len(columns) and int(columns.max()) >= in_features:
        raise IndexError(f"entries: an index is out of range for {in_features} features")
    entries = rows * in_features + columns
    if order is None:
        return entries
    return torch.empty_like(entries).scatter_(0, order.long(), entries)


@functools.cache
def _functions() -> dict[tuple[str, torch.dtype], Callable[..., bool]]:
    """The passes of cpu.cpp by name and dtype; none without a compiler."""
    library = compiled(Path(__file__).with_name("cpu.cpp"))
    functions = {}
    for name, dtype in itertools.product(_ARGUMENTS, _NAMES) if library is not None else ():
        function = getattr(library, f"padst_entries_{name}{_NAMES[dtype]}")
        function.argtypes = [ctypes.c_void_p] * _ARGUMENTS[name]
        function.restype = ctypes.c_bool
        functions[name, dtype] = function
    return functions
