"""dX of vector N:M in CUDA C++, with dX as a tile in shared memory. README.md has the maths."""

from padst_kernels.tiles.cuda.input_gradient import (
    HEIGHTS,
    Tile,
    available,
    launch_input_gradient_tile,
    num_slices,
    slice_entries,
    slices_on,
)

__all__ = [
    "HEIGHTS",
    "Tile",
    "available",
    "launch_input_gradient_tile",
    "num_slices",
    "slice_entries",
    "slices_on",
]
