"""Rows with inputs of their own (V = 1), condensed for inference."""

from padst_kernels.fan_in.op import FanIn, condense, fan_in_linear

__all__ = ["FanIn", "condense", "fan_in_linear"]
