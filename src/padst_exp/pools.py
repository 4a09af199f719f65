"""What structures and algorithms share: words for pools, and the best k of each pool."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# What an algorithm may require of the units and pools of a structure.
#   neurons: a pool is a neuron, or a group of neurons that share inputs, and may read any of them.
#   grid: units are the cells of a grid, each with a row and a column of its own.
#   shuffled_blocks: column c of the g-th group of rows is unit g * I + c, rows may change groups.
Trait = Literal["neurons", "grid", "shuffled_blocks"]

# How to tell a user which structures have it.
TRAITS: dict[Trait, str] = {
    "neurons": "fan_in, whose pools are neurons,",
    "grid": "one whose units have a row and a column each, such as unstructured,",
    "shuffled_blocks": "shuffled_block",
}


def best_of_each(scores: Tensor, k: Tensor, most: int | None = None) -> Tensor:
    """Bool `[P, Q]` that marks the `k[p]` highest `scores` of row p, ties to the lower index.

    Args:
        scores: fp `[P, Q]`; -inf marks what must not be chosen.
        k: int64 `[P]`.
        most: at least the largest of `k`, where that is known; else this waits for the device.
    """
    most = int(k.max()) if most is None else most
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    best = scores.topk(most, dim=1).values
    threshold = best.gather(1, (k - 1).clamp(min=0)[:, None])
    above = scores > threshold
    tied = scores == threshold
    still = k[:, None] - above.sum(1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(1) <= still))
    return chosen & (k > 0)[:, None]
