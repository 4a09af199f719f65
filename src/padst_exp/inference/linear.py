"""Layers of a trained sparse model: packed weights, permutations folded in, for inference first.

Shape letters: I and O features in and out, r rank of a companion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from padst_exp.inference.weights import PackedTiles, PackedWeight, constant
from padst_exp.layers import LowRank
from padst_exp.layers.sparse_conv import Window
from padst_kernels import Backend

Dense = TypeVar("Dense", nn.Linear, nn.Conv2d)


class PackedLinear(nn.Module):
    """y = W x + U V x + b: x `[..., I]` to `[..., O]`, in the dtype of W or of autocast.

    Parameters need no gradient until `requires_grad_()`. A pass in which x or one of them does is
    one of the dense weight, whose zeros stay, in the time and memory that dense layers take:
    enough to fine-tune it, or what lies before it. Fast sparse training is that of a run.

    Args:
        parts: W; several where projections of one input are too different to run as one product,
            their outputs are concatenated.
        bias: `[O]`, or None.
        companion: U V, or None.

    Attributes:
        backend: what multiplies, one of `backends`. Plain PyTorch until something else is proven
            to be as right and faster.
    """

    bias: Tensor | None

    def __init__(
        self, parts: Sequence[PackedWeight], bias: Tensor | None, companion: LowRank | None
    ) -> None:
        super().__init__()
        self.backend: Backend = "torch"
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        self.parts = nn.ModuleList(parts)
        self.register_parameter("bias", None if bias is None else constant(bias))
        self.companion = companion

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._forward(x)
        if x.requires_grad or any(parameter.requires_grad for parameter in self.parameters()):
            return self._forward(x, dense=True)
        with torch.no_grad():
            return self._forward(x)

    def _forward(self, x: Tensor, *, dense: bool = False) -> Tensor:
        # Attributes of a module are found slowly; with few tokens that shows.
        weights, backend = self.weights(), self.backend
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weights[0].values.dtype
        x = x.to(dtype)
        if dense:
            shift = None if self.bias is None else self.bias.to(dtype)
            return nn.functional.linear(x, self.matrix().to(dtype), shift)
        outputs = [weight.product(x, backend) for weight in weights]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        # In place: y is ours, and a second one of its size costs more than the sum.
        companion, bias = self.companion, self._parameters["bias"]
        if companion is not None:
            y.add_(companion(x))
        return y if bias is None else y.add_(bias.to(dtype))

    def weights(self) -> list[PackedWeight]:
        """The parts."""
        parts: Any = self._modules["parts"]
        return list(parts._modules.values())

    @property
    def tiles(self) -> PackedTiles | None:
        """W, where it is one of dense tiles and all there is but a bias."""
        (first, *others) = self.weights()
        alone = not others and self.companion is None
        return first if alone and isinstance(first, PackedTiles) else None

    def backends(self) -> list[Backend]:
        """What can multiply on the device where the layer is."""
        cuda = self.weights()[0].values.is_cuda
        return ["torch", "triton"] if cuda else ["native", "torch"]

    def matrix(self) -> Tensor:
        """W + U V, dense, `[O, I]`."""
        matrix = torch.cat([part.matrix() for part in self.weights()])
        if self.companion is None:
            return matrix
        return matrix + self.companion.matrix().to(matrix.dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight, for parents that read it instead of calling the layer."""
        return self.matrix()

    def dense(self) -> nn.Module:
        """The same layer with a dense weight."""
        return dense_linear(self.matrix(), self.bias)

    def extra_repr(self) -> str:
        rank = 0 if self.companion is None else self.companion.up.shape[1]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank={rank}, backend={self.backend}"
        )


class PackedConv2d(PackedLinear):
    """The same for patches: `[N, C, H, W]` to `[N, O, H', W']`; W `[O, kh * kw * C]`.

    Args:
        window: how it moves over the input.
        parts, bias, companion: as in `PackedLinear`.
    """

    def __init__(
        self,
        window: Window,
        parts: Sequence[PackedWeight],
        bias: Tensor | None,
        companion: LowRank | None,
    ) -> None:
        super().__init__(parts, bias, companion)
        self.window = window

    def _forward(self, x: Tensor, *, dense: bool = False) -> Tensor:
        patches, size = self.window.patches(x)
        return super()._forward(patches, dense=dense).unflatten(1, size).permute(0, 3, 1, 2)

    @property
    def weight(self) -> Tensor:
        """The dense weight, `[O, C, kh, kw]`."""
        return self.matrix().unflatten(1, (*self.window.kernel_size, -1)).permute(0, 3, 1, 2)

    def dense(self) -> nn.Module:
        weight = self.weight
        out_channels, in_channels = weight.shape[:2]
        layer = self.window.convolution(in_channels, out_channels, bias=self.bias is not None)
        return _with_parameters(layer, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.window}"


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of `weight` `[O, I]` and `bias` `[O]`, no gradients."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    return _with_parameters(linear, weight, bias)


def _with_parameters(layer: Dense, weight: Tensor, bias: Tensor | None) -> Dense:
    layer.weight = constant(weight)
    if bias is not None:
        layer.bias = constant(bias)
    layer.eval()
    return layer
