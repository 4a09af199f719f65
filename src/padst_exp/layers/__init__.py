"""Sparse layers: packed values, their topology, their permutations."""

from padst_exp.layers.distribution import layer_densities
from padst_exp.layers.exchange import Place, evidence, places
from padst_exp.layers.low_rank import LowRank
from padst_exp.layers.move import Move
from padst_exp.layers.sparse_conv import SparseConv2d
from padst_exp.layers.sparse_linear import (
    SparseLinear,
    index_stale,
    permutations,
    sparse_layers,
    sparse_weights,
)
from padst_exp.layers.sparse_weight import SparseWeight

__all__ = [
    "LowRank",
    "Move",
    "Place",
    "SparseConv2d",
    "SparseLinear",
    "SparseWeight",
    "evidence",
    "index_stale",
    "layer_densities",
    "permutations",
    "places",
    "sparse_layers",
    "sparse_weights",
]
