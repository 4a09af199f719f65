"""Sparse linear layers through a dense weight that lives only during a pass."""

from padst_kernels.scatter.op import scatter_matmul

__all__ = ["scatter_matmul"]
