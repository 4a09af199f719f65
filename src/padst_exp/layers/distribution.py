"""How a budget is spread over the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from padst_exp.errors import UserError, require


def layer_densities(
    shapes: Mapping[str, tuple[int, int]],
    density: float,
    distribution: Literal["uniform", "erk"] | Mapping[str, float],
) -> dict[str, float]:
    """The density asked of every sparse weight.

    Args:
        shapes: `(O, I)` of each weight by name.
        density: overall share to keep, in (0, 1].
        distribution: `"uniform"`, `"erk"`, or sparsities by pattern over names of weights, or of
            layers (`body.1` for `body.1.weights.0`); what no pattern matches keeps `density`.

    Raises:
        UserError: `density` is outside (0, 1], or a pattern is wrong.
    """
    if not 0 < density <= 1:
        raise UserError(f"density: expected a number in (0, 1], got {density:.6g}")
    if isinstance(distribution, Mapping):
        return _explicit(shapes, density, distribution)
    if distribution == "uniform":
        return dict.fromkeys(shapes, density)
    require(distribution == "erk", "distribution", distribution, "uniform, erk or a mapping")
    return _erdos_renyi(shapes, density)


def _explicit(
    shapes: Mapping[str, tuple[int, int]], density: float, sparsities: Mapping[str, float]
) -> dict[str, float]:
    densities = dict.fromkeys(shapes, density)
    for pattern, sparsity in sparsities.items():
        names = [
            name
            for name in shapes
            if fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".weights.")[0], pattern)
        ]
        if not names:
            some = ", ".join([*shapes][:6]) + (", ..." if len(shapes) > 6 else "")
            raise UserError(
                f"distribution: pattern '{pattern}' matches no sparse weight; there are {some}"
            )
        if not 0 <= sparsity < 1:
            raise UserError(
                f"distribution: expected a sparsity in [0, 1) for '{pattern}', got {sparsity}"
            )
        densities.update(dict.fromkeys(names, 1 - sparsity))
    return densities


def _erdos_renyi(shapes: Mapping[str, tuple[int, int]], density: float) -> dict[str, float]:
    """Densities proportional to (O + I) / (O * I); where one reaches 1 the rest share the excess.

    RigL (Evci et al., 2020), section 3; for linear layers ER and ERK are the same.
    """
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    raw = {name: sum(shapes[name]) / size for name, size in sizes.items()}
    budget = density * sum(sizes.values())
    full: set[str] = set()
    while True:
        left = budget - sum(sizes[name] for name in full)
        scale = left / sum(raw[n] * sizes[n] for n in shapes if n not in full)
        over = {name for name in shapes if name not in full and scale * raw[name] > 1}
        if not over:
            return {n: 1.0 if n in full else scale * raw[n] for n in shapes}
        full |= over
