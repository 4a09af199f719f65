"""Sparse convolutions: patches times the same sparse products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from padst_exp.layers.low_rank import LowRank
from padst_exp.layers.sparse_linear import SparseLinear, _autocast_dtype
from padst_exp.layers.sparse_weight import SparseWeight
from padst_exp.permutations import Permutation


class SparseConv2d(SparseLinear):
    """For an ungrouped `nn.Conv2d`: its weight as `[O, kh * kw * C]`, channels fastest.

    Permutations act on the C channels of the input and the O of the output. Backend `scatter` is
    `F.conv2d` with a dense weight that lives during a pass; the others multiply patches.

    Args:
        convolution: gives kernel size, stride, padding and dilation.
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
        self.taps = convolution.kernel_size[0] * convolution.kernel_size[1]
        super().__init__(weights, bias, input_permutation, output_permutations, companion)
        self.in_channels, self.out_channels = convolution.in_channels, convolution.out_channels
        self.kernel_size = convolution.kernel_size
        self.stride, self.dilation = convolution.stride, convolution.dilation
        self.padding, self.padding_mode = convolution.padding, convolution.padding_mode
        self._pad_sides = convolution._reversed_padding_repeated_twice
        self._pointwise = self.taps == 1 and self.stride == (1, 1) and not any(self._pad_sides)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, O, H', W']`, in the dtype of x or of autocast."""
        if self.stale:
            self.index()
        if self.backend == "scatter" and not self.parts()[0].collect_dense_gradient:
            return self._convolve(x)
        patches, size = self._patches(x)
        y = super().forward(patches)
        return y.unflatten(1, size).permute(0, 3, 1, 2)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[O, C, kh, kw]`, permutations applied. Differentiable."""
        matrix = super().weight
        return matrix.unflatten(1, (*self.kernel_size, -1)).permute(0, 3, 1, 2)

    def dense_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d(
            self._padded(x), weight, stride=self.stride, dilation=self.dilation
        )

    def _convolve(self, x: Tensor) -> Tensor:
        dtype = _autocast_dtype(x) or x.dtype
        y = self.dense_forward(x.to(dtype), self.weight.to(dtype))
        bias = self.live_bias()
        return y if bias is None else y + bias.to(dtype)[:, None, None]

    def _padded(self, x: Tensor) -> Tensor:
        if not any(self._pad_sides):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return functional.pad(x, self._pad_sides, mode=mode)

    def _patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`[N, H' * W', kh * kw * C]`, and `(H', W')`."""
        if self._pointwise:
            return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])
        x = self._padded(x)
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        height, width = (
            (length - span) // step + 1
            for length, span, step in zip(x.shape[2:], spans, self.stride, strict=True)
        )
        columns = functional.unfold(x, self.kernel_size, self.dilation, 0, self.stride)
        # From channels slowest to channels fastest.
        patches = columns.unflatten(1, (-1, self.taps)).permute(0, 3, 2, 1).flatten(2)
        return patches, (height, width)
