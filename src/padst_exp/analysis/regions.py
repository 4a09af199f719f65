"""Linear regions of small ReLU networks, counted, beside PA-DST's bound.

A region is a set of inputs with one pattern of active units. Patterns are counted over random
points, which finds every region that is not too small; the count is a lower bound that more points
raise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Net:
    """Layers of equal width, x <- relu(W x[order] + b).

    Args:
        weights: `[n, n]` of each layer, zero where its mask is.
        biases: `[n]` of each.
        orders: int64 `[n]` of each, the permutation before it; None for none.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    orders: Sequence[Tensor | None]


def random_net(mask: Tensor, depth: int, generator: torch.Generator, *, permuted: bool) -> Net:
    """A network with the same mask bool `[n, n]` in every layer, at the scale of He et al.

    Args:
        mask: of every layer.
        depth: number of layers.
        generator: of weights, biases and permutations; equal ones for both values of `permuted`.
        permuted: put a random permutation before each layer but the first.
    """
    size = len(mask)
    scale = (2 / mask.sum(1, keepdim=True).clamp(min=1)).sqrt()
    weights, biases, orders = [], [], []
    for layer in range(depth):
        weights.append(torch.randn(size, size, generator=generator) * mask * scale)
        biases.append(0.3 * torch.randn(size, generator=generator))
        order = torch.randperm(size, generator=generator)
        orders.append(order if permuted and layer > 0 else None)
    return Net(weights, biases, orders)


def count_regions(net: Net, points: Tensor) -> list[int]:
    """How many activation patterns of the first 1, 2, ... layers some points have.

    Args:
        net: of up to 62 units in all layers together.
        points: `[N, n]`.
    """
    x, code, counts = points, torch.zeros(len(points), dtype=torch.int64), []
    for weight, bias, order in zip(net.weights, net.biases, net.orders, strict=True):
        x = torch.nn.functional.linear(x if order is None else x[:, order], weight, bias)
        for unit in (x > 0).unbind(1):
            code = 2 * code + unit
        counts.append(len(code.unique()))
        x = x.relu_()
    return counts


def sample_points(number: int, size: int, generator: torch.Generator) -> Tensor:
    """Points `[number, size]` of all scales, so that far regions are found as well as near ones."""
    scale = torch.exp(2 * torch.randn(number, 1, generator=generator))
    return torch.randn(number, size, generator=generator) * scale


def bound(width: int, depth: int, rank: int, *, permuted: bool) -> list[float]:
    """PA-DST's bound after 1, 2, ... layers: the product of sum over j <= k of C(n, j).

    k is the number of directions that a layer can tell apart: `rank` in every layer without
    permutations, `rank` more in each layer with them, n at most. (Read in notes on the paper, whose
    own text was out of reach.)

    Args:
        width: n, of inputs and layers.
        depth: number of layers.
        rank: directions of one layer: n if dense, the size of a block, the number of diagonals.
        permuted: whether permutations mix between layers.
    """
    total, found = 1.0, []
    for layer in range(1, depth + 1):
        directions = min(width, rank * layer if permuted else rank)
        total *= sum(math.comb(width, j) for j in range(directions + 1))
        found.append(total)
    return found
