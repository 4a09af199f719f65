"""Sparse layers: packed values, their topology, their permutations."""

from padst_exp.layers.distribution import layer_densities
from padst_exp.layers.sparse_linear import SparseLinear, permutations, sparse_weights
from padst_exp.layers.sparse_weight import SparseWeight

__all__ = ["SparseLinear", "SparseWeight", "layer_densities", "permutations", "sparse_weights"]
