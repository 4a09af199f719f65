"""How operations and kernels are called."""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def needs_operator(x: Tensor, weight: Tensor) -> bool:
    """Whether an operation on `x` and `weight` must be a custom operator.

    So it must under torch.compile, in a dispatch mode (fake tensors, make_fx), and for tensors
    without memory of their own. Otherwise an operator only costs: 20 us a call.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or x.is_meta
    )
