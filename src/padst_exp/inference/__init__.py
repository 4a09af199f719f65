"""Exported models: loading them, measuring what is fastest, running them."""

from padst_exp.inference.graphs import graphed
from padst_exp.inference.linear import CondensedLinear, PackedLinear, TiledLinear
from padst_exp.inference.loading import load
from padst_exp.inference.packing import pack
from padst_exp.inference.tuning import Report, tune

__all__ = [
    "CondensedLinear",
    "PackedLinear",
    "Report",
    "TiledLinear",
    "graphed",
    "load",
    "pack",
    "tune",
]
