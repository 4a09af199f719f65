"""Products with single pseudo-diagonals, on CUDA cores: correct, and not claimed to be fast."""

from padst_kernels.diagonals.op import diagonal_matmul
from padst_kernels.diagonals.reference import diagonal_matmul_reference

__all__ = ["diagonal_matmul", "diagonal_matmul_reference"]
