"""Sparse linear layers through a dense weight that lives only during a pass."""

from padst_kernels.scatter.op import scatter_matmul
from padst_kernels.scatter.reference import scatter_matmul_reference

__all__ = ["scatter_matmul", "scatter_matmul_reference"]
