"""Hard permutations that change: what is proposed, and what a proposal may rest on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Another hard permutation in the place of the one there is.

    Args:
        index: int64 `[d]`.
        carry: whether the values of a feature go with it to its new slot, as far as that slot has
            active entries in the same rows; the others are lost, and entries that it brings anew
            start at zero. If not, values stay in their slots, and so meet other features.
        signs: `[d]`, 1 or -1, what the values of each slot are multiplied by; None: all by 1.
        partner: int64 `[d]`, which features turn into each other from now on, for permutations
            that do so.
    """

    index: Tensor
    carry: bool
    signs: Tensor | None = None
    partner: Tensor | None = None

    def to(self, device: torch.device) -> Exchange:
        """The same on another device."""
        tensors = (self.index, self.signs, self.partner)
        index, signs, partner = (None if t is None else t.to(device) for t in tensors)
        assert index is not None
        return Exchange(index=index, carry=self.carry, signs=signs, partner=partner)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The sparse weights that a permutation acts on, as tables whose columns are its slots.

    Rows are all that meet a slot: outputs of every weight (and positions of a kernel) for a
    permutation of inputs, inputs for one of outputs.

    Args:
        side: on the input side slot i holds feature index[i] of the permutation; on the output
            side slot index[i] is feature i.
        active: bool `[R, d]`.
        values: `[R, d]`, zero where nothing is active.
        gradients: `[K, R, d]`, the gradient of the loss with respect to every entry, active or
            not, each from a K-th of the samples of the step, all of the scale of the whole one.
        budget: how many active entries may be lost.
    """

    side: Literal["in", "out"]
    active: Tensor
    values: Tensor
    gradients: Tensor
    budget: float
