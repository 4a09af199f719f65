"""Algorithms for tests, with the settings of their YAML files, but quick."""

from typing import Any

from padst_exp.dst import Constant, DropGrow, Gradient, Magnitude, Uniform


def set_algorithm(**changes: Any) -> DropGrow:
    """SET: drops by magnitude, grows at random."""
    settings: dict[str, Any] = {
        "drop": Magnitude(),
        "grow": Uniform(),
        "counts": Constant(),
        "fraction": 0.6,
        "interval": 1,
        "stop": 1.0,
        "moments": "age",
    }
    return DropGrow(**settings | changes)


def rigl(**changes: Any) -> DropGrow:
    """RigL: drops by magnitude, grows by gradient."""
    return set_algorithm(**{"grow": Gradient(), **changes})
