"""What structures share with others: words for pools, the best of each pool, symmetries."""

from __future__ import annotations

from collections.abc import Sequence
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

# Up to here sorting a row takes less time than the many calls that do without.
SHORT_ROW = 4096


def best_of_each(scores: Tensor, k: Tensor | int, most: int | None = None) -> Tensor:
    """Bool `[P, Q]` that marks the `k[p]` highest `scores` of row p, ties to the lower index.

    Never fewer: what is no number comes after all numbers, and before what must not be chosen.

    Args:
        scores: fp `[P, Q]`; -inf marks what must not be chosen.
        k: int64 `[P]`, or one number for all rows.
        most: at least the largest of `k`, where that is known; else this waits for the device.
    """
    if most is None:
        most = k if isinstance(k, int) else int(k.max())
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num(nan=lowest, posinf=torch.inf, neginf=-torch.inf)
    wanted = k if isinstance(k, int) else k[:, None]
    if scores.shape[1] <= SHORT_ROW:
        order = scores.argsort(dim=1, descending=True, stable=True)
        first = torch.arange(scores.shape[1], device=scores.device) < wanted
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        return chosen.scatter_(1, order, first.expand_as(order))
    best = scores.topk(most, dim=1).values
    last = k - 1 if isinstance(k, int) else (k[:, None] - 1).clamp_(min=0)
    threshold = best[:, last, None] if isinstance(last, int) else best.gather(1, last)
    above = scores > threshold
    tied = scores == threshold
    return above | (tied & (tied.cumsum(1) <= wanted - above.sum(1, keepdim=True)))


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

    @staticmethod
    def of_all(each: Sequence[Symmetry]) -> Symmetry:
        """The symmetries that all of `each` have, which are of the same features."""
        # To which all features are alike, any permutation is one.
        first, *others = each = [one for one in each if one.labels.any()] or each[:1]
        if all(first.equals(other) for other in others):
            return first
        sizes = [int(one.labels.max()) + 1 for one in each]
        starts = [sum(sizes[:part]) for part in range(len(each))]
        # Cyclic ones have none in common with others but those inside classes.
        kinds = [
            torch.arange(size) if one.step is not None
            else torch.zeros(size, dtype=torch.int64) if one.kinds is None
            else one.kinds
            for one, size in zip(each, sizes, strict=True)
        ]  # fmt: skip
        labels = [one.labels + start for one, start in zip(each, starts, strict=True)]
        joined = Symmetry(labels=torch.cat(labels), kinds=torch.cat(kinds))
        return joined.of_channels(len(each))

    def equals(self, other: Symmetry) -> bool:
        """Whether both are told by the same classes."""
        if self.step != other.step or (self.kinds is None) != (other.kinds is None):
            return False
        same = self.kinds is None or other.kinds is None or torch.equal(self.kinds, other.kinds)
        return same and torch.equal(self.labels, other.labels)
