"""What every sparsity structure offers."""

from __future__ import annotations

import abc
import math

from padst_exp.errors import UserError
from padst_exp.structures.layout import Layout


class Structure(abc.ABC):
    """A family of sparse weights; `layout` gives its geometry for one weight."""

    @abc.abstractmethod
    def layout(self, out_features: int, in_features: int, density: float) -> Layout:
        """Geometry of an `[out_features, in_features]` weight with `density` of it kept.

        Raises:
            UserError: the structure cannot hold that density; names the nearest legal sparsity.
        """

    def auto_side(self, out_features: int, in_features: int) -> str:
        """The side ("in" or "out") a permutation should act on: the shorter one, it costs d * d."""
        return "in" if in_features <= out_features else "out"


def require_units(
    wanted: float, unit_size: int, out_features: int, in_features: int, what: str
) -> None:
    """Refuse a density that leaves less than one whole unit.

    Raises:
        UserError: `wanted` entries are fewer than `unit_size`.
    """
    size = out_features * in_features
    highest = math.floor(max(0.0, 1 - unit_size / size) * 1e4) / 1e4
    # 1 - 0.9 is a little less than 0.1.
    if wanted < unit_size * (1 - 1e-9):
        raise UserError(
            f"sparsity: {1 - wanted / size:.6g} leaves {int(wanted)} entries of a "
            f"{out_features}x{in_features} weight, but {what} holds {unit_size}; "
            f"use sparsity <= {highest} or a smaller unit"
        )


def check_positive(name: str, value: int) -> int:
    """Returns `value`. Raises UserError unless it is at least 1."""
    if value < 1:
        raise UserError(f"structure.{name}: expected an integer of at least 1, got {value}")
    return value
