"""The three passes of a grouped gather GEMM, by whichever backend is asked for.

Shape letters: T tokens, I and O features in and out, G tiles, K columns and V rows of a tile. Here
activations are `[T, features]` in either layout, see activations.py; `feature_major` asks for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padst_kernels import Backend
from padst_kernels.activations import aligned_features, has_aligned_rows
from padst_kernels.tiles import cpu, cuda
from padst_kernels.tiles.index import TileIndex

Norm = tuple[Tensor, Tensor, Tensor]

# From here on a token-major activation whose features are read or written singly is transposed
# first: one more pass over it, where a gather would move 2 bytes of each 32 it touches, again for
# every row group. By arithmetic, not measured.
MIN_TRANSPOSED_TOKENS = 64
# Neighbouring features that make a token-major access 16 bytes wide.
MIN_RUN = 8


def product(
    x: Tensor,
    weight: Tensor,
    index: TileIndex,
    out_features: int,
    backend: Backend,
    *,
    feature_major: bool = False,
    bias: Tensor | None = None,
    gelu: bool = False,
    gelu_gradient: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """y `[T, O]` of x `[T, I]`; the epilogues are those of `launch_product`."""
    if not runs_on_triton(x, backend):
        y = cpu.product(x, weight, index, out_features, native=backend == "native")
        y = _epilogue(y, bias, gelu, gelu_gradient, residual, norm)
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
    dy: Tensor, weight: Tensor, index: TileIndex, backend: Backend, *, feature_major: bool = False
) -> Tensor:
    """dx `[T, I]` of dy `[T, O]`."""
    if not runs_on_triton(dy, backend):
        dx = cpu.input_gradient(dy, weight, index, index.in_features, native=backend == "native")
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
    if not runs_on_triton(x, backend):
        return cpu.weight_gradient(x, dy, index, height, native=backend == "native")
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


def runs_on_triton(x: Tensor, backend: str) -> bool:
    """Whether the Triton kernels compute with `x`.

    Raises:
        ValueError: they should, but cannot.
    """
    if not _prefers_triton(x, backend):
        return False
    if not x.is_cuda:
        from padst_kernels.tiles import kernels

        if not kernels.are_interpreted():
            raise ValueError(
                f"backend {backend!r} needs a GPU, got a tensor on {x.device}; use 'torch' there"
            )
    return True


def _prefers_triton(x: Tensor, backend: str) -> bool:
    # Triton has no float64 matrix instructions.
    return backend in ("triton", "cuda") and x.dtype != torch.float64


def _precision(x: Tensor) -> str:
    # Not allow_tf32, which raises once fp32_precision was set to TF32.
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def pays_to_transpose(x: Tensor) -> bool:
    """Whether token-major `x`, read or written feature by feature, is better transposed first."""
    return x.shape[0] >= MIN_TRANSPOSED_TOKENS


def shared(x: Tensor, run: int, backend: str) -> Tensor:
    """`x`, or the copy of it that every pass would make."""
    return readable(x, run) if _prefers_triton(x, backend) else x


def readable(x: Tensor, run: int) -> Tensor:
    """`x`, or a copy in the layout in which aligned runs of `run` features are best read."""
    if has_aligned_rows(x.t()):
        return x
    if run < MIN_RUN and pays_to_transpose(x):
        return aligned_features(x).t()
    return x.contiguous()


def _epilogue(
    y: Tensor,
    bias: Tensor | None,
    gelu: bool,
    gelu_gradient: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
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
