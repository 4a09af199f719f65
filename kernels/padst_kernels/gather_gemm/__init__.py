"""Grouped gather GEMM: every structure whose rows share their inputs in groups."""

from padst_kernels.gather_gemm.fused import gather_gemm_fused
from padst_kernels.gather_gemm.index import TileIndex, tile_index
from padst_kernels.gather_gemm.layout import aligned_features, empty_features
from padst_kernels.gather_gemm.op import gather_gemm
from padst_kernels.gather_gemm.passes import Backend
from padst_kernels.gather_gemm.reference import gather_gemm_reference

__all__ = [
    "Backend",
    "TileIndex",
    "aligned_features",
    "empty_features",
    "gather_gemm",
    "gather_gemm_fused",
    "gather_gemm_reference",
    "tile_index",
]
