"""Weights whose rows have inputs of their own (constant fan-in, unstructured, diagonals)."""

from padst_kernels.fan_in.index import FanIn, FanInIndex, condense, fan_in_index
from padst_kernels.fan_in.op import fan_in_linear, fan_in_product

__all__ = ["FanIn", "FanInIndex", "condense", "fan_in_index", "fan_in_linear", "fan_in_product"]
