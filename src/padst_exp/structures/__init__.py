"""Sparsity structures: how a weight is cut into units, and how such weights multiply."""

from padst_exp.structures.block import Block
from padst_exp.structures.butterfly import Butterfly
from padst_exp.structures.diagonal import Diagonal
from padst_exp.structures.fan_in import FanIn
from padst_exp.structures.geometry import Geometry, Tiling, gather_entries, scatter_entries
from padst_exp.structures.index import Folding, permuted_tiles, tile_shape
from padst_exp.structures.nm import NM
from padst_exp.structures.product import Product, Storage, backends, product, runs
from padst_exp.structures.shuffled_block import ShuffledBlock
from padst_exp.structures.structure import Structure, best_units, random_units
from padst_exp.structures.unstructured import Dense, Unstructured
from padst_kernels import Backend

__all__ = [
    "NM",
    "Backend",
    "Block",
    "Butterfly",
    "Dense",
    "Diagonal",
    "FanIn",
    "Folding",
    "Geometry",
    "Product",
    "ShuffledBlock",
    "Storage",
    "Structure",
    "Tiling",
    "Unstructured",
    "backends",
    "best_units",
    "gather_entries",
    "permuted_tiles",
    "product",
    "random_units",
    "runs",
    "scatter_entries",
    "tile_shape",
]
