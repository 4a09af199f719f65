"""Products with single pseudo-diagonals, on CUDA cores: correct, and not claimed to be fast."""

from padst_kernels.diagonals.op import diagonal_matmul

__all__ = ["diagonal_matmul"]
