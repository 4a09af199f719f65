"""Sparse convolutions: patches times the same sparse products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from padst_exp.layers.low_rank import LowRank
from padst_exp.layers.sparse_linear import SparseLinear, _autocast_dtype
from padst_exp.layers.sparse_weight import SparseWeight
from padst_exp.permutations import Permutation


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input: what an `nn.Conv2d` knows besides its weight.

    Args:
        kernel_size, stride, padding, dilation, padding_mode: attributes of an `nn.Conv2d`.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> Window:
        """The window of a dense convolution."""
        return cls(**{field.name: getattr(convolution, field.name) for field in fields(cls)})

    def convolution(self, in_channels: int, out_channels: int, *, bias: bool) -> nn.Conv2d:
        """A dense convolution with this window, on the meta device."""
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        return nn.Conv2d(in_channels, out_channels, bias=bias, device="meta", **arguments)

    @property
    def sides(self) -> list[int]:
        """Padding of the left, right, upper and lower edge."""
        if isinstance(self.padding, str):
            spans = zip(self.dilation, self.kernel_size, strict=True)
            totals = [d * (k - 1) if self.padding == "same" else 0 for d, k in spans]
            pairs = [(total // 2, total - total // 2) for total in totals]
        else:
            pairs = [(width, width) for width in self.padding]
        return [side for pair in reversed(pairs) for side in pair]

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """`F.conv2d` of `[N, C, H, W]` with a dense weight `[O, C, kh, kw]`."""
        padded = self._padded(x)
        return functional.conv2d(padded, weight, stride=self.stride, dilation=self.dilation)

    def patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`[N, H' * W', kh * kw * C]` of `[N, C, H, W]`, channels fastest, and `(H', W')`."""
        x = self._padded(x)
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        height, width = (
            (length - span) // step + 1
            for length, span, step in zip(x.shape[2:], spans, self.stride, strict=True)
        )
        if self.kernel_size == (1, 1):
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
            return x.flatten(2).transpose(1, 2), (height, width)
        # Runs of channels are copied whole: `unfold` moves single numbers, and puts channels last
        # by a second copy. The last tap first, since backward adds them up the other way round.
        x = x.permute(0, 2, 3, 1).contiguous()
        down, right = self.stride
        taps = [
            x[:, top : top + height * down : down, left : left + width * right : right]
            for top in reversed(range(0, spans[0], self.dilation[0]))
            for left in reversed(range(0, spans[1], self.dilation[1]))
        ]
        return torch.stack(taps[::-1], 3).flatten(3).flatten(1, 2), (height, width)

    def _padded(self, x: Tensor) -> Tensor:
        if not any(self.sides):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return functional.pad(x, self.sides, mode=mode)


class SparseConv2d(SparseLinear):
    """For an ungrouped `nn.Conv2d`: its weight as `[O, kh * kw * C]`, channels fastest.

    Permutations act on the C channels of the input and the O of the output. Backend `scatter` is
    `F.conv2d` with a dense weight that lives during a pass; the others multiply patches.

    Args:
        convolution: gives the window: kernel size, stride, padding and dilation.
        weights, bias, input_permutation, output_permutations, companion: as in `SparseLinear`.
    """

    def __init__(
        self,
        convolution: nn.Conv2d,
        weights: Sequence[SparseWeight],
        bias: Tensor | None,
        input_permutation: Permutation | None,
        output_permutations: Sequence[Permutation | None],
        companion: LowRank | None = None,
    ) -> None:
        self.window = Window.of(convolution)
        self.taps = math.prod(self.window.kernel_size)
        super().__init__(weights, bias, input_permutation, output_permutations, companion)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, O, H', W']`, in the dtype of x or of autocast."""
        if self.stale:
            self.index()
        collecting = any(weight.collect_dense_gradient for weight in self.parts())
        if self.backend == "scatter" and not collecting:
            return self._convolve(x)
        patches, size = self.window.patches(x)
        y = super().forward(patches)
        return y.unflatten(1, size).permute(0, 3, 1, 2)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[O, C, kh, kw]`, permutations applied. Differentiable."""
        return self._kernel(super().weight)

    def _kernel(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, (*self.window.kernel_size, -1)).permute(0, 3, 1, 2)

    def dense_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.window.convolve(x, weight)

    def _convolve(self, x: Tensor) -> Tensor:
        dtype = _autocast_dtype(x) or x.dtype
        y = self.dense_forward(x.to(dtype), self._kernel(self._matrix()).to(dtype))
        bias = self.bias
        return y if bias is None else y + bias.to(dtype)[:, None, None]
