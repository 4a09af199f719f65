"""Triton kernels of the grouped gather GEMM, and their launchers: tensors in, tensors out.

    launch_product(x, weight, columns, row_pointer, out_features, *, rows, order, transposed, run,
                   bias, gelu, gelu_gradient, residual, norm, feature_major, precision, launch)
        -> y [O, T]
    launch_input_gradient(dy, weight, rows, column_pointer, slots, in_features, *, run,
                          feature_major, precision, workspace, launch)
        -> dx [I, T]
    launch_weight_gradient(x, dy, columns, row_pointer, rows, height, *, order, run, precision,
                           splits, launch)
        -> dweight [G, K, V]

Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile,
R row groups. Activations are `[features, T]` views, see activations.py, and their strides say how
they lie in memory. A feature-major tensor whose rows do not all start on a multiple of 16 elements
is refused.

Index tensors are int32. Permutations are folded into them by the caller: `columns` holds the
feature of x behind each column of a tile, `rows` the feature of y behind each row of a row group
(None: in natural order). A feature out of range marks padding: read as zero, never stored.
README.md has the maths and what the compiled code must look like.
"""

from padst_kernels.activations import empty_features, readable_tokens
from padst_kernels.tiles.kernels.common import LaunchShape
from padst_kernels.tiles.kernels.input_gradient import launch_input_gradient
from padst_kernels.tiles.kernels.product import launch_product
from padst_kernels.tiles.kernels.weight_gradient import launch_weight_gradient

__all__ = [
    "LaunchShape",
    "empty_features",
    "launch_input_gradient",
    "launch_product",
    "launch_weight_gradient",
    "readable_tokens",
]
