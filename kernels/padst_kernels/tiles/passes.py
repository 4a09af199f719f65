"""The three passes of a grouped gather GEMM, by whichever backend is asked for.

Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile. Here
activations are `[T, features]` in either layout, see activations.py; `feature_major` asks for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padst_kernels.activations import aligned_features, has_aligned_rows
from padst_kernels.backends import Backend
from padst_kernels.devices import pays_to_transpose, readable, runs_on_triton
from padst_kernels.tiles import cuda, native, plain
from padst_kernels.tiles.index import TileIndex


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    index: TileIndex,
    gelu_gradient: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    row_sums: Tensor | None,
    out_features: int,
    gelu: bool,
    feature_major: bool,
    x_feature_major: bool,
    backend: Backend,
) -> Tensor:
    """y `[T, O]` of x `[T, I]`, with the epilogues of `launch_product`.

    `x_feature_major` is the layout that its gradient shall have.
    """
    norm = None
    if mean is not None and rstd is not None and row_sums is not None:
        norm = mean, rstd, row_sums
    y = native.product(x, weight, index, out_features) if backend == "native" else None
    if y is None and not runs_on_triton(x, backend):
        y = plain.product(x, weight, index, out_features)
    if y is not None:
        y = _epilogue(y, norm, bias, gelu, gelu_gradient, residual)
        return aligned_features(y).t() if feature_major else y
    from padst_kernels.tiles import kernels

    run = index.column_run
    transposes = not feature_major and index.rows is not None and pays_to_transpose(x)
    y = kernels.launch_product(
        readable(x, run).t(),
        weight.contiguous(),
        index.columns,
        index.row_pointer,
        out_features,
        rows=index.rows,
        order=index.order,
        run=run,
        bias=bias,
        gelu=gelu,
        gelu_gradient=None if gelu_gradient is None else readable(gelu_gradient, 1).t(),
        residual=None if residual is None else readable(residual, 1).t(),
        norm=norm,
        feature_major=feature_major or transposes,
        precision=_precision(x),
    ).t()
    return y.contiguous() if transposes else y


def input_gradient(
    dy: Tensor, weight: Tensor, index: TileIndex, feature_major: bool, backend: Backend
) -> Tensor:
    """dx `[T, I]` of dy `[T, O]`."""
    dx = native.input_gradient(dy, weight, index) if backend == "native" else None
    if dx is None and not runs_on_triton(dy, backend):
        dx = plain.input_gradient(dy, weight, index)
    if dx is not None:
        return aligned_features(dx).t() if feature_major else dx
    run = index.row_run(weight.shape[2])
    dy, weight = readable(dy, run), weight.contiguous()
    if index.transposed_columns is None:
        if backend == "cuda" and _has_tile_kernel(dy, weight, index):
            return _input_gradient_by_slices(dy, weight, index, feature_major)
        return _input_gradient_by_slots(dy, weight, index, run, feature_major)
    from padst_kernels.tiles import kernels

    scattered = index.transposed_rows is not None
    transposes = not feature_major and scattered and pays_to_transpose(dy)
    dx = kernels.launch_product(
        dy.t(),
        weight,
        index.transposed_columns,
        index.transposed_pointer,
        index.in_features,
        rows=index.transposed_rows,
        order=index.transposed_order,
        transposed=True,
        run=run,
        feature_major=feature_major or transposes,
        precision=_precision(dy),
    ).t()
    return dx.contiguous() if transposes else dx


def _input_gradient_by_slots(
    dy: Tensor, weight: Tensor, index: TileIndex, run: int, feature_major: bool
) -> Tensor:
    """`input_gradient` where tiles share columns in any way, as those of vector N:M do."""
    from padst_kernels.tiles import kernels

    assert index.tile_rows is not None and index.slots is not None
    return kernels.launch_input_gradient(
        dy.t(),
        weight,
        index.tile_rows,
        index.column_pointer,
        index.slots,
        index.in_features,
        run=run,
        feature_major=feature_major,
        precision=_precision(dy),
    ).t()


def _has_tile_kernel(dy: Tensor, weight: Tensor, index: TileIndex) -> bool:
    half = dy.dtype in (torch.bfloat16, torch.float16)
    return half and index.slice_entries is not None and weight.shape[2] in cuda.HEIGHTS


def _input_gradient_by_slices(
    dy: Tensor, weight: Tensor, index: TileIndex, feature_major: bool
) -> Tensor:
    """The same with dX as tiles in shared memory."""
    assert index.tile_rows is not None and index.slice_entries is not None
    features = dy.t() if has_aligned_rows(dy.t()) else aligned_features(dy)
    dx = cuda.launch_input_gradient_tile(
        features, weight, index.tile_rows, index.slice_entries, index.in_features
    ).t()
    return dx if feature_major else dx.contiguous()


def weight_gradient(
    x: Tensor, dy: Tensor, index: TileIndex, height: int, backend: Backend
) -> Tensor:
    """dweight `[G, K, V]` of x `[T, I]` and dy `[T, O]`."""
    dweight = native.weight_gradient(x, dy, index, height) if backend == "native" else None
    if dweight is None and not runs_on_triton(x, backend):
        dweight = plain.weight_gradient(x, dy, index, height)
    if dweight is not None:
        return dweight
    from padst_kernels.tiles import kernels

    run = index.column_run
    return kernels.launch_weight_gradient(
        readable(x, run).t(),
        readable(dy, index.row_run(height)).t(),
        index.columns,
        index.row_pointer,
        index.rows,
        height,
        order=index.order,
        run=run,
        precision=_precision(x),
    )


def _precision(x: Tensor) -> str:
    # Not allow_tf32, which raises once fp32_precision was set to TF32.
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def _epilogue(
    y: Tensor,
    norm: tuple[Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
    gelu: bool,
    gelu_gradient: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    if norm is not None:
        mean, rstd, row_sums = norm
        y = (rstd[:, None] * (y - mean[:, None] * row_sums)).to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if gelu:
        y = torch.nn.functional.gelu(y)
    if gelu_gradient is not None:
        # Contiguous, as the first operand decides how the result lies.
        y = torch.ops.aten.gelu_backward(gelu_gradient.contiguous(), y)
    return y if residual is None else y + residual
