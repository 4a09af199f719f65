"""Weights whose rows have inputs of their own (constant fan-in, unstructured, diagonals)."""

from padst_kernels.entries.index import Condensed, EntryIndex, condense, entry_index
from padst_kernels.entries.op import condensed_matmul, entry_matmul

__all__ = ["Condensed", "EntryIndex", "condense", "condensed_matmul", "entry_index", "entry_matmul"]
