"""Dynamic sparse training: scores, schedules, the drop-and-grow rule, soft selections."""

from padst_exp.dst.algorithm import MIN_DYNAMIC_UNITS, Algorithm, DropGrow, Static
from padst_exp.dst.scores import DropScore, Gradient, GrowScore, Magnitude, Uniform
from padst_exp.dst.selection import Selection
from padst_exp.dst.topology import Change, Signal, Signals, Topology

__all__ = [
    "MIN_DYNAMIC_UNITS",
    "Algorithm",
    "Change",
    "DropGrow",
    "DropScore",
    "Gradient",
    "GrowScore",
    "Magnitude",
    "Selection",
    "Signal",
    "Signals",
    "Static",
    "Topology",
    "Uniform",
]
