"""Dynamic sparse training: scores, schedules, the drop-and-grow rule, soft selections."""

from padst_exp.dst.algorithm import Algorithm, DropGrow, Periodic, Static
from padst_exp.dst.choosing import SRSTE, TopKAST
from padst_exp.dst.cht import CH2L3, CH3L3, SoftMagnitude
from padst_exp.dst.counts import Constant, Counts, Cubic, Elastic, Sigmoid
from padst_exp.dst.dsb import DSB
from padst_exp.dst.dynadiag import DynaDiag
from padst_exp.dst.gates import MagnitudeGate
from padst_exp.dst.scores import (
    DropScore,
    Gradient,
    GrowScore,
    Magnitude,
    MagnitudeAndGradient,
    Uniform,
)
from padst_exp.dst.selection import Gate, Selection
from padst_exp.dst.srigl import SRigL
from padst_exp.dst.topology import Change, Entries, Signal, Signals, Topology

__all__ = [
    "CH2L3",
    "CH3L3",
    "DSB",
    "SRSTE",
    "Algorithm",
    "Change",
    "Constant",
    "Counts",
    "Cubic",
    "DropGrow",
    "DropScore",
    "DynaDiag",
    "Elastic",
    "Entries",
    "Gate",
    "Gradient",
    "GrowScore",
    "Magnitude",
    "MagnitudeAndGradient",
    "MagnitudeGate",
    "Periodic",
    "SRigL",
    "Selection",
    "Sigmoid",
    "Signal",
    "Signals",
    "SoftMagnitude",
    "Static",
    "TopKAST",
    "Topology",
    "Uniform",
]
