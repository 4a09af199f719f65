"""Dynamic sparse training: scores, schedules and the drop-and-grow rule."""

from padst_exp.dst.algorithm import Algorithm, DropGrow, Static
from padst_exp.dst.scores import DropScore, Gradient, GrowScore, Magnitude, Uniform
from padst_exp.dst.topology import Relayout, Signals, Topology

__all__ = [
    "Algorithm",
    "DropGrow",
    "DropScore",
    "Gradient",
    "GrowScore",
    "Magnitude",
    "Relayout",
    "Signals",
    "Static",
    "Topology",
    "Uniform",
]
