"""The product: the forward pass, and dX where the transpose is one of the family too."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from padst_kernels.activations import empty_features, readable_tokens
from padst_kernels.devices import on_its_device
from padst_kernels.tiles.kernels.common import LaunchShape, block_height, load_columns


@triton.jit
def _product_kernel(
    x,
    weight,
    columns,
    row_pointer,
    order,
    rows,
    mean,
    rstd,
    row_sums,
    bias,
    other,
    y,
    in_features,
    out_features,
    num_tokens,
    x_tokens,
    y_tokens,
    num_programs,
    x_feature_stride,
    x_token_stride,
    y_feature_stride,
    y_token_stride,
    other_feature_stride,
    other_token_stride,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH_STRIDE: tl.constexpr,
    HEIGHT_STRIDE: tl.constexpr,
    RUN: tl.constexpr,
    GELU: tl.constexpr,
    GELU_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
):
    # Row groups are the fastest axis, so that all of them meet a token tile while it is in L2.
    parts: tl.constexpr = (HEIGHT + BLOCK_V - 1) // BLOCK_V
    t = tl.program_id(0) // num_programs * BLOCK_T + tl.arange(0, BLOCK_T)
    x += t.to(tl.int64)[:, None] * x_token_stride
    if other is not None:
        other += t.to(tl.int64)[:, None] * other_token_stride
    y += t.to(tl.int64)[:, None] * y_token_stride
    for step in range(ROW_BLOCKS):
        block = tl.program_id(0) % num_programs * ROW_BLOCKS + step
        group = block // parts
        v = block % parts * BLOCK_V + tl.arange(0, BLOCK_V)
        if row_pointer is None:
            first = group
            num_columns = WIDTH
        else:
            first = tl.load(row_pointer + group)
            num_columns = (tl.load(row_pointer + group + 1) - first) * WIDTH
        group_columns = columns + first.to(tl.int64) * WIDTH

        # Tokens on M: with V on N, wgmma serves every V from 8.
        acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for start in range(0, num_columns, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = k < num_columns
            column, known = load_columns(group_columns, k, inside, in_features, RUN)
            x_tile = tl.load(
                x + column.to(tl.int64)[None, :] * x_feature_stride,
                mask=known[None, :] & (t < x_tokens)[:, None],
                other=0.0,
                cache_modifier=".ca" if ROW_BLOCKS > 1 else "",
            )
            if row_pointer is None:
                tile = first
                inner = k
            else:
                tile = first + k // WIDTH
                inner = k % WIDTH
                if order is not None:
                    tile = tl.load(order + tile, mask=inside, other=0)
            offset = tile.to(tl.int64) * (WIDTH * HEIGHT) + inner * WIDTH_STRIDE
            weight_mask = inside[:, None]
            if HEIGHT % BLOCK_V != 0:
                weight_mask = weight_mask & (v < HEIGHT)[None, :]
            weight_tile = tl.load(
                weight + offset[:, None] + (v * HEIGHT_STRIDE)[None, :], mask=weight_mask, other=0.0
            )
            acc = tl.dot(x_tile, weight_tile, acc, input_precision=PRECISION)

        row = group * HEIGHT + v
        if rows is not None:
            row = tl.load(rows + row, mask=v < HEIGHT, other=out_features)
        stored = row < out_features
        if HEIGHT % BLOCK_V != 0:
            stored = stored & (v < HEIGHT)
        if mean is not None:
            mean_t = tl.load(mean + t, mask=t < num_tokens, other=0.0)[:, None]
            rstd_t = tl.load(rstd + t, mask=t < num_tokens, other=0.0)[:, None]
            sums = tl.load(row_sums + row, mask=stored, other=0.0)[None, :]
            acc = rstd_t * (acc - mean_t * sums)
        if bias is not None:
            acc += tl.load(bias + row, mask=stored, other=0.0).to(tl.float32)[None, :]
        if GELU or GELU_GRADIENT:
            cdf = 0.5 + 0.5 * tl.math.erf(acc * 0.7071067811865476)
        if GELU:
            acc *= cdf
        if GELU_GRADIENT:
            acc = cdf + acc * 0.3989422804014327 * tl.exp(-0.5 * acc * acc)
        mask = stored[None, :] & (t < y_tokens)[:, None]
        if other is not None:
            at = other + row.to(tl.int64)[None, :] * other_feature_stride
            operand = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            acc = acc * operand if GELU_GRADIENT else acc + operand
        at = y + row.to(tl.int64)[None, :] * y_feature_stride
        tl.store(at, acc.to(y.dtype.element_ty), mask=mask)


@on_its_device
def launch_product(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    row_pointer: Tensor | None,
    out_features: int,
    *,
    rows: Tensor | None = None,
    order: Tensor | None = None,
    transposed: bool = False,
    run: int = 1,
    bias: Tensor | None = None,
    gelu: bool = False,
    gelu_gradient: Tensor | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    feature_major: bool = True,
    precision: str = "ieee",
    launch: LaunchShape | None = None,
) -> Tensor:
    """y[rows[r, v]] = residual + gelu(bias + norm(sum weight[g, k, v] x[columns[g, k]])), g in r.

    The forward pass, and dX of a structure whose transpose is one of this family: there x is dY,
    row groups are groups of inputs, and `order` lists the tiles of the forward weight by them.

    Args:
        x: `[I, T]` view, float32, bfloat16 or float16.
        weight: `[G, K, V]`, dtype of x, contiguous; `[G, V, K]` if `transposed`.
        columns: int32 `[G, K]`, features of x; the tiles of a row group follow each other.
        row_pointer: int32 `[R + 1]`, tiles of row group r are row_pointer[r] to row_pointer[r + 1];
            None when tile r is row group r.
        out_features: O.
        rows: int32 `[R * V]`, each feature below O once; None when y lies in natural order.
        order: int32 `[G]`, which tile of `weight` stands at each place of `columns`; needs
            `row_pointer`.
        transposed: read every tile of `weight` transposed.
        run: columns come in whole aligned runs: columns[g, j * run + i] = run * c + i, run divides
            K. Fewer index loads, and 16-byte ones of a token-major x.
        bias: `[O]`, any floating point.
        gelu: apply the exact (erf) GELU.
        gelu_gradient: `[O, T]` view that the derivative of GELU multiplies, instead: from a
            gradient behind GELU to the one before it. Not with `gelu` or `residual`.
        residual: `[O, T]` view.
        norm: mean `[T]`, rstd `[T]` and row sums of the weight `[O]`, float32: LayerNorm
            of x, as rstd * (sum - mean * row sum).
        feature_major: layout of y.
        precision: of float32 products: "ieee" or "tf32".
        launch: sizes to use instead of the default for this shape.

    Returns:
        `[O, T]` view, dtype of x.

    Raises:
        ValueError: a feature-major activation is not aligned.
    """
    width, height = weight.shape[1:]
    strides = (height, 1)
    if transposed:
        width, height = height, width
        strides = (1, width)
    num_groups = len(columns) if row_pointer is None else len(row_pointer) - 1
    assert columns.shape == (len(weight), width) and columns.is_contiguous() and width % run == 0
    assert weight.is_contiguous() and weight.dtype == x.dtype
    assert order is None or row_pointer is not None
    assert gelu_gradient is None or (residual is None and not gelu)
    in_features, num_tokens = x.shape
    y = empty_features(out_features, num_tokens, x, feature_major)
    if not y.numel():
        return y
    block_v = block_height(height)
    num_blocks = num_groups * triton.cdiv(height, block_v)
    if launch is None:
        extent = width * triton.cdiv(len(columns), num_groups)
        launch = _launch_shape(x, extent, block_v, run, transposed)
    y_tokens = readable_tokens("y", y)
    other = residual if gelu_gradient is None else gelu_gradient
    if other is not None:
        name = "residual" if gelu_gradient is None else "gelu_gradient"
        y_tokens = min(y_tokens, readable_tokens(name, other))
    row_blocks = math.gcd(launch.row_blocks, num_blocks)
    num_programs = num_blocks // row_blocks
    # One axis: the others of CUDA end at 65,535.
    _product_kernel[(num_programs * triton.cdiv(num_tokens, launch.tokens),)](
        x,
        weight,
        columns,
        row_pointer,
        order,
        rows,
        *((None, None, None) if norm is None else (t.contiguous() for t in norm)),
        None if bias is None else bias.contiguous(),
        other,
        y,
        in_features,
        out_features,
        num_tokens,
        readable_tokens("x", x),
        y_tokens,
        num_programs,
        *x.stride(),
        *y.stride(),
        *((0, 0) if other is None else other.stride()),
        WIDTH=width,
        HEIGHT=height,
        WIDTH_STRIDE=strides[0],
        HEIGHT_STRIDE=strides[1],
        RUN=run,
        GELU=gelu,
        GELU_GRADIENT=gelu_gradient is not None,
        PRECISION=precision,
        BLOCK_T=launch.tokens,
        BLOCK_K=launch.columns,
        BLOCK_V=block_v,
        ROW_BLOCKS=row_blocks,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return y


def _launch_shape(x: Tensor, width: int, block_v: int, run: int, transposed: bool) -> LaunchShape:
    tokens = min(128, max(16, triton.next_power_of_2(x.shape[1])))
    # 64 columns make 16-byte copies of a weight tile 16 rows high by 128 threads; 4-byte operands
    # fill shared memory twice as fast.
    columns = min(64 if x.element_size() == 2 else 32, max(16, triton.next_power_of_2(width)))
    if x.stride(0) == 1 and run < 8:
        # Every element of a token-major gather is addressed by itself, out of registers.
        tokens, columns = min(tokens, 64), min(columns, 32)
    # Under Triton 3.6 a third buffer for transposed tiles this high spills on sm_80.
    stages = 4 if transposed and block_v >= 128 else 5
    return LaunchShape(
        tokens, columns, warps=8 if tokens * block_v >= 128 * 128 else 4, stages=stages
    )
