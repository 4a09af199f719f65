"""Sparse linear layers through a dense weight that lives only during a pass."""

from padst_kernels.scatter_linear.op import scatter_linear

__all__ = ["scatter_linear"]
