"""Where one permutation acts, as tables: all that a learner may know of what it permutes."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Site:
    """One side of one or several sparse weights, whose features a permutation brings into slots.

    Args:
        size: d features.
        importance: `[R, d]`, at least 0, what each entry of the dense weight is worth, such as its
            square; features are columns. None: fresh weights, of which nothing is known.
        best: from the importance as the sparse weight sees it, `[R, d]` with columns in slots, to
            the entries that its structure would keep, bool `[R, d]`.
    """

    size: int
    importance: Tensor | None
    best: Callable[[Tensor], Tensor]
