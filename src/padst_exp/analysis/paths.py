"""How far masks that follow each other mix their inputs: what no mask shows by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from padst_exp.analysis.spectrum import top_two


@dataclass(frozen=True)
class Mixing:
    """Of the product of some consecutive masks, which counts the paths between features.

    Args:
        layers: how many masks.
        reach: share of pairs of an input and an output that a path connects.
        ratio: second singular value over the first, 0 where every input reaches every output by
            equally many paths; 1 where the product falls apart into equal pieces.
    """

    layers: int
    reach: float
    ratio: float


def mixing(masks: Iterable[Tensor]) -> list[Mixing]:
    """Reachability and spectral ratio after each of consecutive masks.

    Args:
        masks: bool, `[O_1, I]`, `[O_2, O_1]`, ...
    """
    found: list[Mixing] = []
    product: Tensor | None = None
    for mask in masks:
        step = mask.double()
        product = step if product is None else step @ product
        # Only ratios count, and numbers of paths grow exponentially.
        product = product / product.max().clamp(min=1e-300)
        first, second = top_two(product)
        reach = float((product > 0).double().mean())
        found.append(Mixing(len(found) + 1, reach, second / first if first else 1.0))
    return found


def shuffled(masks: Iterable[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random masks of the same shapes and numbers of entries: what to compare with."""
    return [
        mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
        for mask in (mask.cpu() for mask in masks)
    ]
