"""Launcher of input_gradient.cu, and the index it reads.

Shape letters: T tokens, I and O features in and out, G groups (tiles of the weight), K columns and
V rows of a group, S slices of the inputs.
"""

from __future__ import annotations

import functools
import math
from ctypes import c_int, c_longlong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from padst_kernels.activations import empty_features, readable_tokens
from padst_kernels.tiles.cuda import nvrtc

SOURCE = Path(__file__).with_name("input_gradient.cu")
KERNEL = "input_gradient_tile"
HEIGHTS = (16, 32, 64, 128)

# As in the source: tokens of a block, of two warps side by side.
_TOKENS = 64
MAX_WARPS = {16: 16, 32: 16, 64: 16, 128: 12}
# Deep where a stage is small, and at most 32 kB, so that 768 inputs still fit beside on sm_90.
_STAGES = {16: 8, 32: 6, 64: 3, 128: 2}


@dataclass(frozen=True)
class LaunchShape:
    """How a block works: `warps` (even, from 4 to 16; to 12 where V = 128), `stages` of dY."""

    warps: int
    stages: int


def available(device: torch.device) -> bool:
    """Whether `launch_input_gradient_tile` runs there: sm_80 or later, with NVRTC.

    All of these have the shared memory for some number of slices, see `num_slices`.
    """
    if device.type != "cuda" or nvrtc.compiler() is None or nvrtc.driver() is None:
        return False
    return torch.cuda.get_device_properties(device).major >= 8


def num_slices(in_features: int, height: int, shared_memory: int, stages: int | None = None) -> int:
    """The fewest slices S of the inputs, each of whose tiles fits into a block.

    Args:
        in_features: I.
        height: V.
        shared_memory: bytes a block may have: `shared_memory_per_block_optin` of the device's
            properties; 227 kB on sm_90, 163 kB on sm_80.
        stages: of dY; those of the default tile if None.
    """
    stage_bytes = (stages or _STAGES[height]) * height * _TOKENS * 2
    rows = (shared_memory - stage_bytes) // (_TOKENS * 4)
    return max(1, math.ceil(in_features / rows))


def slices_on(device: torch.device, in_features: int, height: int) -> int | None:
    """`num_slices` of a device; None where the kernel does not run, or has no such V."""
    if height not in HEIGHTS or not available(device):
        return None
    # Not every version of torch declares this one.
    properties: Any = torch.cuda.get_device_properties(device)
    return num_slices(in_features, height, properties.shared_memory_per_block_optin)


def slice_entries(columns: Tensor, in_features: int, num_slices: int) -> Tensor:
    """What each slice of ceil(I / S) inputs reads of each group; derived once per topology.

    Columns may stand anywhere, an input permutation folded in; those of a group are distinct.

    Args:
        columns: integers `[G, K]`, K <= 65,536, in the order of the weight's tiles; I for padding.
        in_features: I.
        num_slices: S.

    Returns:
        int32 `[S, G, K]`: row of the slice's tile << 16 | k for the columns of group g that lie in
        the slice, by ascending k, then -1.
    """
    rows = math.ceil(in_features / num_slices)
    columns = columns.long()
    slices = torch.arange(num_slices, device=columns.device)[:, None, None]
    absent = (columns // rows != slices) | (columns >= in_features)
    k = torch.arange(columns.shape[1], device=columns.device)
    entries = (columns % rows << 16 | k).masked_fill(absent, -1)
    order = absent.int().argsort(dim=-1, stable=True)
    return entries.gather(-1, order).int()


def launch_input_gradient_tile(
    dy: Tensor,
    weight: Tensor,
    rows: Tensor,
    entries: Tensor,
    in_features: int,
    *,
    launch: LaunchShape | None = None,
) -> Tensor:
    """dx[i] = sum over g, k with columns[g, k] = i of weight[g, k] . dy[rows[g]].

    The twin of `launch_input_gradient`, without its workspace: each block keeps dX of 64 tokens and
    one slice of the inputs in shared memory as float32. Deterministic. Feature-major only.

    Args:
        dy: `[O, T]` view, feature-major, bfloat16 or float16, on a device that is `available`.
        weight: `[G, K, V]`, dtype of dy, contiguous, V in 16, 32, 64, 128.
        rows: int32 `[G, V]`, the feature of y behind each row of group g; O or more for padding,
            behind which the weight may hold any finite value.
        entries: int32 `[S, G, K]`, made by `slice_entries`.
        in_features: I.
        launch: to use instead of the default for this shape.

    Returns:
        `[I, T]` view, feature-major, dtype of dy.

    Raises:
        ValueError: V or the dtype is none of these, S is too small for the device's shared memory,
            or dy is not feature-major and aligned.
        RuntimeError: NVRTC or the driver refuses.
    """
    num_groups, width, height = weight.shape
    if height not in HEIGHTS or dy.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"input gradient: {height} rows in a group of {dy.dtype}, expected one of {HEIGHTS} "
            "and bfloat16 or float16"
        )
    if dy.stride(1) != 1:
        raise ValueError(f"input gradient: dy has strides {dy.stride()}, expected feature-major")
    assert weight.is_contiguous() and weight.dtype == dy.dtype
    assert rows.shape == (num_groups, height) and rows.dtype == torch.int32
    assert entries.shape[1:] == (num_groups, width) and entries.dtype == torch.int32
    assert rows.is_contiguous() and entries.is_contiguous()
    out_features, num_tokens = dy.shape
    dx = empty_features(in_features, num_tokens, dy)
    dy_tokens, dx_tokens = readable_tokens("dy", dy), readable_tokens("dx", dx)
    if weight.data_ptr() % 16:
        weight = weight.clone()
    slices = len(entries)
    slice_rows = math.ceil(in_features / slices)
    launch = launch or _launch_shape(height, math.ceil(width / slices), slices)
    assert launch.warps in range(4, MAX_WARPS[height] + 1, 2) and launch.stages >= 2
    kernel = _kernel(dy.device, height, dy.dtype, launch.stages, slice_rows)
    if dx.numel():
        kernel.launch(
            math.ceil(num_tokens / _TOKENS) * slices,
            launch.warps * 32,
            _stream(dy.device),
            [
                *(c_void_p(tensor.data_ptr()) for tensor in (dy, weight, rows, entries, dx)),
                *map(c_int, (num_groups, width, out_features, in_features, slice_rows, slices)),
                *map(c_int, (dy_tokens, dx_tokens)),
                *map(c_longlong, (dy.stride(0), dx.stride(0))),
            ],
        )
    return dx


def definitions(height: int, dtype: torch.dtype, stages: int | None = None) -> dict[str, int]:
    """The macros of one variant of the source."""
    return {
        "HEIGHT": height,
        "STAGES": stages or _STAGES[height],
        "BFLOAT16": int(dtype == torch.bfloat16),
    }


def shared_bytes(height: int, stages: int | None, slice_rows: int) -> int:
    """Dynamic shared memory of a block: the tile of dX and the stages of dY."""
    return slice_rows * _TOKENS * 4 + (stages or _STAGES[height]) * height * _TOKENS * 2


def _launch_shape(height: int, slots: int, slices: int) -> LaunchShape:
    # Two warps have 16 slots of the group at a time. Slices do not have equal shares of a group.
    pairs = math.ceil(slots / 16) + (slices > 1)
    turns = math.ceil(2 * pairs / MAX_WARPS[height])
    return LaunchShape(warps=2 * max(2, math.ceil(pairs / turns)), stages=_STAGES[height])


@functools.cache
def _kernel(
    device: torch.device, height: int, dtype: torch.dtype, stages: int, slice_rows: int
) -> nvrtc.Kernel:
    properties: Any = torch.cuda.get_device_properties(device)
    needed = shared_bytes(height, stages, slice_rows)
    if needed > properties.shared_memory_per_block_optin:
        raise ValueError(
            f"input gradient: {slice_rows} inputs in a slice need {needed} bytes of shared memory, "
            f"the device has {properties.shared_memory_per_block_optin}; use num_slices"
        )
    architecture = properties.major * 10 + properties.minor
    image = _image(architecture, height, dtype, stages)
    return nvrtc.Kernel(image, KERNEL, device.index, needed)


@functools.cache
def _image(architecture: int, height: int, dtype: torch.dtype, stages: int) -> bytes:
    return nvrtc.compile_source(SOURCE, architecture, definitions(height, dtype, stages))


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
