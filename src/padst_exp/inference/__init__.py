"""Exported models: loading them, measuring what is fastest, running them."""

from padst_exp.inference.linear import CondensedLinear, PackedLinear, TiledLinear
from padst_exp.inference.loading import load
from padst_exp.inference.packing import pack

__all__ = ["CondensedLinear", "PackedLinear", "TiledLinear", "load", "pack"]
