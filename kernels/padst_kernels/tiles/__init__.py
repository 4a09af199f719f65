"""Grouped gather GEMM: every structure whose rows share their inputs in groups."""

from padst_kernels.activations import aligned_features, empty_features
from padst_kernels.tiles.fused import tile_matmul_fused
from padst_kernels.tiles.index import TileIndex, tile_index
from padst_kernels.tiles.op import tile_matmul
from padst_kernels.tiles.reference import tile_matmul_reference

__all__ = [
    "TileIndex",
    "aligned_features",
    "empty_features",
    "tile_index",
    "tile_matmul",
    "tile_matmul_fused",
    "tile_matmul_reference",
]
