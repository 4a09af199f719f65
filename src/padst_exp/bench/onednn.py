"""Dense layers by oneDNN, called directly.

PyTorch multiplies single precision on a CPU by MKL, which uses half of the vector units of an AMD
core; oneDNN, which comes with PyTorch too, uses them all. Models do not get there by themselves,
so the usual ratio is to the faster of eager and compiled PyTorch, and a second one is to the
fastest of all dense contenders.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the products of oneDNN can be called by themselves."""
    ops = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and ops


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


# Inductor would take over oneDNN's own operator, and knows it for constant weights only.
@torch.library.custom_op("padst_bench::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return _product(x, weight)


@_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    dx = _linear(dy.contiguous(), weight.t().contiguous())
    return dx, _linear(dy.t().contiguous(), x.t().contiguous())


_linear.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class OneDNNLinear(nn.Module):
    """A linear layer by oneDNN, `[..., I]` to `[..., O]`, that shares the parameters of `linear`.

    `num_tokens`: pack the weight, for inference with so many tokens; None: do not pack.
    """

    def __init__(self, linear: nn.Linear, num_tokens: int | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.packed = linear.weight, linear.bias, None
        if num_tokens is not None:
            pack = torch.ops.mkldnn._reorder_linear_weight
            self.packed = pack(linear.weight.detach(), num_tokens)

    def forward(self, x: Tensor) -> Tensor:
        # An operator of our own costs some microseconds more.
        plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        weight = self.weight if self.packed is None else self.packed
        y = (_product if plain else _linear)(x.reshape(-1, x.shape[-1]), weight)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def use_onednn(model: nn.Module, num_tokens: int | None) -> None:
    """Replace every linear layer of `model`, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, OneDNNLinear(module, num_tokens))
