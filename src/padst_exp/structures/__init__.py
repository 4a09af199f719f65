"""Sparsity structures as stateless geometry."""

from padst_exp.structures.block import Block
from padst_exp.structures.diagonal import Diagonal
from padst_exp.structures.folding import permuted_entries, permuted_tiles
from padst_exp.structures.layout import Layout, gather_entries, scatter_entries
from padst_exp.structures.nm import NM
from padst_exp.structures.product import Backend, Product, Storage, alike
from padst_exp.structures.structure import Structure
from padst_exp.structures.unstructured import Dense, Unstructured

__all__ = [
    "NM",
    "Backend",
    "Block",
    "Dense",
    "Diagonal",
    "Layout",
    "Product",
    "Storage",
    "Structure",
    "Unstructured",
    "alike",
    "gather_entries",
    "permuted_entries",
    "permuted_tiles",
    "scatter_entries",
]
