"""dX of vector N:M in CUDA C++, with dX as a tile in shared memory. README.md has the maths."""

from padst_kernels.tiles.cuda.input_gradient import (
    HEIGHTS,
    LaunchShape,
    available,
    launch_input_gradient_tile,
    num_slices,
    slice_entries,
    slices_on,
)

__all__ = [
    "HEIGHTS",
    "LaunchShape",
    "available",
    "launch_input_gradient_tile",
    "num_slices",
    "slice_entries",
    "slices_on",
]
