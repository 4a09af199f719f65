"""Sparse products: one folder for each kind of product, with a kernel for each kind of device."""

from typing import Literal

# What multiplies. native: C++ compiled for this CPU. torch: plain PyTorch, on any device. triton,
# cuda: kernels of a GPU. scatter: a dense product with a weight that lives only during a pass.
Backend = Literal["native", "torch", "triton", "cuda", "scatter"]

__all__ = ["Backend"]
