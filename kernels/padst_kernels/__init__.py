"""Sparse products: one folder for each kind of product, with a kernel for each kind of device."""

from typing import Literal

# What multiplies. native: C++ compiled for this CPU. torch: plain PyTorch, on any device. triton,
# cuda: kernels of a GPU. scatter: a dense product with a weight that lives only during a pass.
# semi_structured: the same, whose forward product is that of a GPU's sparse tensor cores (2:4).
Backend = Literal["native", "torch", "triton", "cuda", "scatter", "semi_structured"]

__all__ = ["Backend"]
