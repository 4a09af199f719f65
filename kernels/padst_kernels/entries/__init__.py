"""Weights whose rows have inputs of their own (constant fan-in, unstructured, diagonals)."""

from padst_kernels.entries.index import Condensed, EntryIndex, condense, entry_index
from padst_kernels.entries.op import condensed_matmul, entry_matmul
from padst_kernels.entries.reference import condensed_matmul_reference, entry_matmul_reference

__all__ = [
    "Condensed",
    "EntryIndex",
    "condense",
    "condensed_matmul",
    "condensed_matmul_reference",
    "entry_index",
    "entry_matmul",
    "entry_matmul_reference",
]
