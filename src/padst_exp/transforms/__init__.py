"""Sparse-IFT: dense models made larger by as much as sparsity then makes them cheaper."""

from padst_exp.transforms.drop_in import SparseDoped, SparseFactorized, SparseParallel
from padst_exp.transforms.loading import rebuild
from padst_exp.transforms.transform import (
    NoTransform,
    Original,
    Transform,
    Transformed,
    example,
)
from padst_exp.transforms.wide import SparseWide, widened

__all__ = [
    "NoTransform",
    "Original",
    "SparseDoped",
    "SparseFactorized",
    "SparseParallel",
    "SparseWide",
    "Transform",
    "Transformed",
    "example",
    "rebuild",
    "widened",
]
