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
from transformers.pytorch_utils import Conv1D

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
    if torch.compiler.is_compiling():
        return _operator(x, weight)
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Linear.apply(x, weight)
    return _product(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _gradients(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx = _product(dy, weight.t().contiguous())
    return dx, _product(dy.t().contiguous(), x.t().contiguous())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return _gradients(x, weight, dy)


# Inductor would take over oneDNN's own operator, and knows it for constant weights only. A packed
# weight is opaque: its shape comes with it.


@torch.library.custom_op("padst_bench::linear", mutates_args=())
def _operator(x: Tensor, weight: Tensor) -> Tensor:
    return _product(x, weight)


@_operator.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


@torch.library.custom_op("padst_bench::linear_gradients", mutates_args=())
def _gradients_operator(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _gradients(x, weight, dy.contiguous())


@_gradients_operator.register_fake
def _(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _gradients_operator(*ctx.saved_tensors, dy)


_operator.register_autograd(_backward, setup_context=_setup_context)


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
        self.transposed = isinstance(linear, Conv1D)
        self.weight, self.bias = weight, bias
        self.packed: Tensor | None = None
        if num_tokens is not None:
            plain = weight.t().contiguous() if self.transposed else weight
            self.packed = packed_weight(plain, num_tokens)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I]` to `[..., O]`."""
        cast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        weight = self.packed
        if weight is None:
            weight = (self.weight.t().contiguous() if self.transposed else self.weight).to(dtype)
        y = onednn_linear(flat, weight)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or transformers' `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D)


def use_onednn(model: nn.Module, layers: list[str], num_tokens: int | None) -> None:
    """Replace the named linear layers of `model`, in place."""
    for name in layers:
        model.set_submodule(name, OneDNNLinear(model.get_submodule(name), num_tokens))
