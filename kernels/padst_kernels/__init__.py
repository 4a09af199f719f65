"""Sparse products: one folder for each kind of product, with a kernel for each kind of device.

Importing it makes PyTorch know the operators, which saved programs (`torch.export`) call by name.
"""

from padst_kernels import diagonals, entries, scatter, tiles
from padst_kernels.backends import Backend, is_here

__all__ = ["Backend", "diagonals", "entries", "is_here", "scatter", "tiles"]
