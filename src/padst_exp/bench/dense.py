"""The dense side at its best: what PyTorch does, and the fastest dense kernels there are beside.

On CPUs PyTorch multiplies single precision by MKL, which uses half of the vector units of an AMD
core; oneDNN, which comes with PyTorch too, uses them all. No model of a user gets there without
being told, so the usual ratio is to the faster of eager and compiled PyTorch; a second one is to
the fastest of all dense sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's products can be called by themselves."""
    return (
        device.type == "cpu"
        and dtype in ONEDNN_DTYPES
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def packed_weight(weight: Tensor, num_tokens: int) -> Tensor:
    """`weight` `[O, I]` in the order in which oneDNN reads it best, for inference."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), num_tokens)


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x `[T, I]` times `weight` `[O, I]` by oneDNN. Differentiable unless the weight is packed."""
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Linear.apply(x, weight)
    return _product(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return _product(dy, weight.t().contiguous()), _product(
            dy.t().contiguous(), x.t().contiguous()
        )


class OneDNNLinear(nn.Module):
    """A linear layer, or transformers' `Conv1D`, by oneDNN.

    Args:
        linear: shares its parameters.
        num_tokens: pack the weight for so many, for inference; None: do not pack.
    """

    def __init__(self, linear: nn.Module, num_tokens: int | None) -> None:
        super().__init__()
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        self.transposed = not isinstance(linear, nn.Linear)
        self.weight, self.bias = weight, bias
        self.packed: Tensor | None = None
        if num_tokens is not None:
            plain = weight.t().contiguous() if self.transposed else weight
            self.packed = packed_weight(plain, num_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I]` to `[..., O]`."""
        flat = x.reshape(-1, x.shape[-1])
        if self.packed is not None:
            y = _product(flat, self.packed)
        else:
            weight = self.weight.t().contiguous() if self.transposed else self.weight
            y = onednn_linear(flat, weight)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def use_onednn(model: nn.Module, layers: list[str], num_tokens: int | None) -> None:
    """Replace the named linear layers of `model`, in place."""
    for name in layers:
        model.set_submodule(name, OneDNNLinear(model.get_submodule(name), num_tokens))
