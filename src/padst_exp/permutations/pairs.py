"""Disjoint pairs of features, the best first."""

from collections.abc import Iterator

from torch import Tensor

# Pairs looked at, for each feature; what ranks below is not worth the sorting of all d^2.
DEPTH = 32


def disjoint_pairs(gains: Tensor) -> Iterator[tuple[int, int]]:
    """Yield pairs i < j in falling order of `gains` `[d, d]`, positive ones, each feature once."""
    size = len(gains)
    upper = gains.triu(1).flatten()
    best = upper.topk(min(len(upper), DEPTH * size))
    places = best.indices[best.values > 0].tolist()
    free = [True] * size
    for place in places:
        one, other = divmod(place, size)
        if free[one] and free[other]:
            free[one] = free[other] = False
            yield one, other
