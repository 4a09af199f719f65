"""What kernels rely on in an index, checked where an operation is called from outside.

A layer derives its index by `tile_index` or `entry_index`, and calls with `trusted=True`: numbers
are then read once, where they are made, and a call costs what it did.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from padst_kernels.calls import is_recorded

INT32 = (torch.int32,)

# What an index tensor is called, the tensor, its shape, the largest number in it, and whether its
# numbers ascend.
Part = tuple[str, Tensor | None, tuple[int, ...], int, bool]


def require_index(
    operation: str,
    parts: Iterable[Part],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = INT32,
) -> None:
    """Refuse index tensors that a kernel would read wrongly.

    Numbers are not looked at while PyTorch records a graph, or where tensors have no memory.

    Raises:
        ValueError: one has another shape, dtype or device, or is not contiguous.
        IndexError: one has a number out of its range, or that does not ascend.
    """
    for name, tensor, shape, largest, ascends in parts:
        if tensor is None:
            continue
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: {name} is {tuple(tensor.shape)} {tensor.dtype} with strides "
                f"{tensor.stride()}, expected {shape} of {wanted}, contiguous"
            )
        if tensor.device != device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, x on {device}")
        if not tensor.numel() or is_recorded(tensor):
            continue
        numbers = tensor.flatten().long()
        first, last = (int(number) for number in numbers.aminmax())
        if first < 0 or last > largest:
            raise IndexError(
                f"{operation}: {name} is out of range, from {first} to {last}, "
                f"expected 0 to {largest}"
            )
        if ascends and bool((numbers.diff() < 0).any()):
            raise IndexError(f"{operation}: {name} is out of range, expected numbers that ascend")
