"""A forward pass that calculates nothing: shapes only, for models of any size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

_BATCH_NORM = torch.ops.aten.native_batch_norm.default


class _BatchNorm(TorchDispatchMode):
    """The shape of a batch norm at once: torch takes it apart into thirty operations."""

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _BATCH_NORM:
            x: Tensor = args[0]
            return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_pass(model: nn.Module) -> Iterator[None]:
    """Whatever `model` computes inside is computed in evaluation, on fake tensors.

    Parameters and inputs may be real, or all of them on the meta device. Attention is done as two
    products and a softmax, whatever a device would choose.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            _BatchNorm(),
            sdpa_kernel(SDPBackend.MATH),
            torch.no_grad(),
        ):
            yield
    finally:
        for module, was in training.items():
            module.training = was
