"""Linear layers between activations of either layout, with what surrounds them in a block.

Activations are `[T, features]` views, T tokens. Token-major, features lie side by side in memory;
feature-major, tokens do, and T is a multiple of 16 so that every row is aligned.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.inference.linear import PackedLinear
from padst_exp.inference.weights import constant
from padst_kernels import Backend
from padst_kernels.tiles import tile_matmul_fused

Statistics = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Fusion:
    """What a block does around one of its products.

    Args:
        norm: the LayerNorm in front of it.
        scale: `[O]`, multiplies its output (LayerScale).
        gelu: behind it: "none", "tanh" or, for the erf form, "exact".
        feature_major: layout of its output.
        reads_feature_major: layout of its input.
        residual: whether a residual is added to its output.
    """

    norm: nn.LayerNorm | None = None
    scale: Tensor | None = None
    gelu: Literal["none", "tanh", "exact"] = "none"
    feature_major: bool = True
    reads_feature_major: bool = True
    residual: bool = False


class FeatureLinear(nn.Module, abc.ABC):
    """y = gelu(scale * (W norm(x) + b)) + residual, without gradients.

    The affine part of the norm and the scale are folded into W and b. What is left of the norm,
    the statistics of each token, applies behind the product: rstd * (W x - mean * row_sums).

    Args:
        dense: W `[O, I]`, as it was.
        bias: b `[O]`, as it was; or None.
        fusion: what the block does around it.
    """

    bias: Tensor
    row_sums: Tensor | None

    def __init__(self, dense: Tensor, bias: Tensor | None, fusion: Fusion) -> None:
        super().__init__()
        self.gelu, self.feature_major = fusion.gelu, fusion.feature_major
        wide = dense.to(torch.promote_types(dense.dtype, torch.float32))
        total = wide.new_zeros(len(wide)) if bias is None else bias.to(wide.dtype)
        norm, row_sums = fusion.norm, None
        if fusion.scale is not None:
            wide, total = wide * fusion.scale[:, None], total * fusion.scale
        if norm is not None:
            if norm.bias is not None:
                total = total + wide @ norm.bias.to(wide.dtype)
            row_sums = wide.sum(1) if norm.weight is None else wide @ norm.weight.to(wide.dtype)
        self.register_buffer("row_sums", row_sums)
        self.bias = constant(total.to(dense.dtype))

    @abc.abstractmethod
    def forward(
        self, x: Tensor, residual: Tensor | None = None, statistics: Statistics | None = None
    ) -> Tensor:
        """y `[T, O]` of x `[T, I]`; mean and rstd, `[T]` each, where there is a norm."""

    def _activate(self, y: Tensor) -> Tensor:
        if self.gelu == "none":
            return y
        return nn.functional.gelu(y, approximate="tanh" if self.gelu == "tanh" else "none")


class TiledFeatureLinear(FeatureLinear):
    """By the gather GEMM, with everything in its epilogue but a tanh GELU.

    Args:
        layer: the packed layer; its `tiles` is not None.
        backend: one of the layer's.
        fusion: what the block does around it.
    """

    def __init__(self, layer: PackedLinear, backend: Backend, fusion: Fusion) -> None:
        tiles = layer.tiles
        assert tiles is not None
        gamma = None if fusion.norm is None else fusion.norm.weight
        super().__init__(tiles.matrix(), layer.bias, fusion)
        self.tiles = tiles.scaled(gamma, fusion.scale)
        self.backend: Backend = backend

    def forward(
        self, x: Tensor, residual: Tensor | None = None, statistics: Statistics | None = None
    ) -> Tensor:
        norm = None
        if statistics is not None and self.row_sums is not None:
            norm = (*statistics, self.row_sums)
        y = tile_matmul_fused(
            x.t(),
            self.tiles.values,
            self.tiles.index(),
            self.tiles.out_features,
            backend=self.backend,
            bias=self.bias,
            gelu=self.gelu == "exact",
            residual=None if residual is None else residual.t(),
            norm=norm,
            feature_major=self.feature_major,
            trusted=True,
        ).t()
        return self._activate(y) if self.gelu == "tanh" else y

    def extra_repr(self) -> str:
        return f"backend={self.backend}"


class DenseFeatureLinear(FeatureLinear):
    """By a dense product.

    Args:
        layer: packed or dense.
        fusion: what the block does around it.
    """

    def __init__(self, layer: PackedLinear | nn.Linear, fusion: Fusion) -> None:
        weight = layer.weight.detach()
        super().__init__(weight, layer.bias, fusion)
        dtype = weight.dtype
        if fusion.norm is not None and fusion.norm.weight is not None:
            weight = weight * fusion.norm.weight
        if fusion.scale is not None:
            weight = weight * fusion.scale[:, None]
        self.weight = constant(weight.to(dtype))

    def forward(
        self, x: Tensor, residual: Tensor | None = None, statistics: Statistics | None = None
    ) -> Tensor:
        y = (self.weight @ x.t()).t() if self.feature_major else x @ self.weight.t()
        if statistics is not None and self.row_sums is not None:
            mean, rstd = statistics
            y = (rstd[:, None] * (y - mean[:, None] * self.row_sums)).to(y.dtype)
        y = self._activate(y + self.bias)
        return y if residual is None else y + residual
