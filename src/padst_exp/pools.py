"""What structures share with others: words for pools, the best of each pool, symmetries."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Symmetry:
    """Which permutations of the features on one side of a weight only relabel its topologies.

    They move whole classes of features, in any order inside, to the places of classes of the same
    width: of any of the same kind, or, cyclic ones, all by the same number of classes.

    Args:
        labels: int64 `[d]`, the class of each feature, 0 .. K-1.
        kinds: int64 `[K]`; None: all classes are of one kind.
        step: cyclic, by multiples of so many classes, which divides K; None: not cyclic.
    """

    labels: Tensor
    kinds: Tensor | None = None
    step: int | None = None

    def of_channels(self, taps: int) -> Symmetry:
        """The symmetries among them that do the same at every one of `taps` equal parts."""
        if taps == 1:
            return self
        at_taps = self.labels.view(taps, -1).T
        classes, labels = at_taps.unique(dim=0, return_inverse=True)
        if self.step is not None and bool((at_taps == at_taps[:, :1]).all()):
            return Symmetry(labels=labels, step=self.step)
        own = torch.arange(len(classes))
        if self.step is not None:
            return Symmetry(labels=labels, kinds=own)
        kinds = torch.zeros_like(classes) if self.kinds is None else self.kinds[classes]
        kinds = kinds.unique(dim=0, return_inverse=True)[1]
        # A class that shares features of another tap with a further one cannot move alone.
        widths = self.labels.bincount()[classes]
        whole = (widths == labels.bincount()[:, None]).all(1)
        return Symmetry(labels=labels, kinds=torch.where(whole, kinds, len(classes) + own))
