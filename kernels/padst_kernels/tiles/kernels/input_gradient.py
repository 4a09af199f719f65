"""dX of structures that are not closed under transposition, in two passes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from padst_kernels.activations import empty_features, readable_tokens
from padst_kernels.devices import on_its_device
from padst_kernels.tiles.kernels.common import LaunchShape
from padst_kernels.tiles.kernels.product import launch_product


@triton.jit
def _slot_sum_kernel(
    z,
    column_pointer,
    slots,
    dx,
    in_features,
    z_tokens,
    dx_tokens,
    z_feature_stride,
    dx_feature_stride,
    dx_token_stride,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    num_blocks = tl.cdiv(in_features, BLOCK_I)
    i = tl.program_id(0) % num_blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.program_id(0) // num_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.load(column_pointer + i, mask=i < in_features, other=0)
    last = tl.load(column_pointer + i + 1, mask=i < in_features, other=0)
    acc = tl.zeros((BLOCK_I, BLOCK_T), tl.float32)
    for step in range(0, tl.max(last - first, 0)):
        inside = first + step < last
        slot = tl.load(slots + first + step, mask=inside, other=0)
        acc += tl.load(
            z + slot.to(tl.int64)[:, None] * z_feature_stride + t[None, :],
            mask=inside[:, None] & (t < z_tokens)[None, :],
            other=0.0,
        ).to(tl.float32)
    dx += i.to(tl.int64)[:, None] * dx_feature_stride + t.to(tl.int64)[None, :] * dx_token_stride
    mask = (i < in_features)[:, None] & (t < dx_tokens)[None, :]
    tl.store(dx, acc.to(dx.dtype.element_ty), mask=mask)


@on_its_device
def launch_input_gradient(
    dy: Tensor,
    weight: Tensor,
    rows: Tensor,
    column_pointer: Tensor,
    slots: Tensor,
    in_features: int,
    *,
    run: int = 1,
    feature_major: bool = True,
    precision: str = "ieee",
    workspace: int = 1 << 28,
    launch: LaunchShape | None = None,
) -> Tensor:
    """dx[i] = sum over slots s = g * K + k with columns[g, k] = i of weight[g, k] . dy[rows[g]].

    For structures that are not closed under transposition, in two deterministic passes: every
    slot's product Z `[G * K, T]` is written in the dtype of dy, then each input adds its slots.

    Args:
        dy: `[O, T]` view.
        weight: `[G, K, V]`, dtype of dy, contiguous.
        rows: int32 `[G, V]`, the feature of y behind each row of tile g.
        column_pointer: int32 `[I + 1]`, the slots of input i are column_pointer[i] to
            column_pointer[i + 1].
        slots: int32 `[G * K]`, sorted by their column.
        in_features: I.
        run: `rows` comes in aligned runs, see `launch_product`.
        feature_major: layout of dx.
        precision: of float32 products.
        workspace: bytes of Z to hold at a time; tokens are cut to stay below.
        launch: sizes for the first pass.

    Returns:
        `[I, T]` view, dtype of dy.

    Raises:
        ValueError: a feature-major activation is not aligned.
    """
    num_tokens = dy.shape[1]
    num_slots = weight.shape[0] * weight.shape[1]
    dx = empty_features(in_features, num_tokens, dy, feature_major)
    if not num_slots:
        return dx.zero_()
    chunk = max(workspace // (num_slots * dy.element_size()) // 128 * 128, 128)
    for begin in range(0, num_tokens, chunk):
        dy_chunk, dx_chunk = dy[:, begin : begin + chunk], dx[:, begin : begin + chunk]
        z = launch_product(
            dy_chunk,
            weight,
            rows,
            None,
            num_slots,
            transposed=True,
            run=run,
            precision=precision,
            launch=launch,
        )
        block_t = min(128, max(16, triton.next_power_of_2(z.shape[1])))
        _slot_sum_kernel[(triton.cdiv(in_features, 16) * triton.cdiv(z.shape[1], block_t),)](
            z,
            column_pointer,
            slots,
            dx_chunk,
            in_features,
            readable_tokens("z", z),
            readable_tokens("dx", dx_chunk),
            z.stride(0),
            *dx_chunk.stride(),
            BLOCK_I=16,
            BLOCK_T=block_t,
            num_warps=4,
        )
    return dx
