"""A dense low-rank companion of a sparse product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """U V x, added to what a sparse layer computes (PixelatedBFly, Dao et al. 2022, section 3.3).

    Starts at zero, so that the sparse layer alone decides the first outputs.

    Args:
        out_features: O.
        in_features: I.
        rank: r.
        generator: draws V.

    Attributes:
        up: U, Parameter `[O, r]`.
        down: V, Parameter `[r, I]`.
    """

    def __init__(
        self, out_features: int, in_features: int, rank: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        noise = torch.randn(rank, in_features, generator=generator)
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.down = nn.Parameter(noise / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., I]` to `[..., O]`, in the dtype of x."""
        inside = nn.functional.linear(x, self.down.to(x.dtype))
        return nn.functional.linear(inside, self.up.to(x.dtype))

    def matrix(self) -> Tensor:
        """U V, `[O, I]`. Differentiable."""
        return self.up @ self.down
