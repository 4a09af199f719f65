"""What every sparsity structure offers."""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from padst_exp.errors import UserError, require
from padst_exp.pools import best_of_each
from padst_exp.structures.geometry import Geometry


class Structure(abc.ABC):
    """A family of sparse weights; `geometry` cuts one weight into units and pools."""

    @abc.abstractmethod
    def geometry(self, out_features: int, in_features: int, density: float) -> Geometry:
        """Units and pools of an `[out_features, in_features]` weight.

        Args:
            out_features: O.
            in_features: I.
            density: share of the weight that is to stay; some structures cut by it.

        Raises:
            UserError: the structure cannot hold that density; names the nearest legal sparsity.
        """

    def initial_counts(self, geometry: Geometry, density: float) -> Tensor:
        """Active units of each pool, int64 `[P]`: within one unit of `density` in all."""
        size = geometry.shape[0] * geometry.shape[1]
        return share_budget(density * size, geometry.candidates, geometry.unit_sizes)

    def auto_side(self, out_features: int, in_features: int) -> str:
        """The side ("in" or "out") a permutation should act on: the shorter one, it costs d * d."""
        return "in" if in_features <= out_features else "out"


def share_budget(budget: float, candidates: Tensor, unit_sizes: Tensor) -> Tensor:
    """Active units per pool, int64 `[P]`, whose entries come nearest to `budget` entries.

    Every pool first gets the whole part of its proportional share; what remains goes one unit at
    a time to the pools with the largest fractional parts (largest remainder, ties to the lower
    pool), as long as a unit brings the total closer. Among pools of equal size counts therefore
    differ by at most one, and the total is within one unit of the budget.
    """
    density = budget / float((candidates * unit_sizes).sum())
    share = candidates.double() * min(density, 1.0)
    counts = share.floor().clamp(max=candidates).to(torch.int64)
    left = budget - float((counts * unit_sizes).sum())
    # Rounding keeps 0.1 * 30 from losing its unit to a share of 2.9999999999999996.
    remainder = (share - counts).round(decimals=9)
    for pool in remainder.sort(descending=True, stable=True).indices.tolist():
        size = int(unit_sizes[pool])
        if counts[pool] < candidates[pool] and abs(left - size) < abs(left):
            counts[pool] += 1
            left -= size
    return counts


def random_units(geometry: Geometry, counts: Tensor, generator: torch.Generator) -> Tensor:
    """A random topology, int64 `[N]` sorted ids: `counts` `[P]` units of each pool."""
    return best_units(geometry, counts, geometry.random_scores(generator))


def best_units(geometry: Geometry, counts: Tensor, scores: Tensor) -> Tensor:
    """The topology with the highest `scores` `[P, Q]` in every pool, ties to lower ids.

    Args:
        geometry: units and pools.
        counts: int64 `[P]`, units of each pool.
        scores: floating point `[P, Q]`.

    Returns:
        Sorted unit ids, int64 `[N]`, on the CPU.
    """
    exists = torch.arange(geometry.pool_size) < geometry.candidates[:, None]
    ranked = scores.cpu().masked_fill(~exists, -torch.inf)
    return best_of_each(ranked, counts).flatten().nonzero().squeeze(1)


def require_units(
    wanted: float, unit_size: int, out_features: int, in_features: int, what: str, other: str = ""
) -> None:
    """Refuse a density that leaves less than one whole unit, `what`; `other` would make it smaller.

    Raises:
        UserError: `wanted` entries are fewer than `unit_size`.
    """
    size = out_features * in_features
    highest = math.floor(max(0.0, 1 - unit_size / size) * 1e4) / 1e4
    ways = [f"sparsity <= {highest}"] if highest else []
    ways += [other] if other else []
    # 1 - 0.9 is a little less than 0.1.
    if wanted < unit_size * (1 - 1e-9):
        raise UserError(
            f"sparsity: {1 - wanted / size:.6g} leaves {int(wanted)} entries of a "
            f"{out_features}x{in_features} weight, but {what} holds {unit_size}; "
            f"use {' or '.join(ways) or 'another structure'}"
        )


def check_positive(name: str, value: int) -> int:
    """Returns `value`. Raises UserError unless it is at least 1."""
    require(value >= 1, f"structure.{name}", value, "an integer of at least 1")
    return value
