"""Which backend can compute with a tensor, and in which layout its kernels read best."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

from padst_kernels.activations import aligned_features, has_aligned_rows

P = ParamSpec("P")

# From here on a token-major activation whose features are read or written singly is transposed
# first: one more pass over it, where a gather would move 2 bytes of each 32 it touches, again for
# every row group. By arithmetic, not measured.
MIN_TRANSPOSED_TOKENS = 64
# Neighbouring features that make a token-major access 16 bytes wide.
MIN_RUN = 8


def runs_on_triton(x: Tensor, backend: str) -> bool:
    """Whether Triton kernels compute with `x`.

    Raises:
        ValueError: they should, but cannot.
    """
    if not _prefers_triton(x, backend):
        return False
    if not x.is_cuda and not is_interpreted():
        raise ValueError(
            f"backend {backend!r} needs a GPU, got a tensor on {x.device}; use 'torch' there"
        )
    return True


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: on any device, slowly."""
    from triton import knobs

    return knobs.runtime.interpret


def on_its_device(
    launch: Callable[Concatenate[Tensor, P], Tensor],
) -> Callable[Concatenate[Tensor, P], Tensor]:
    """`launch` with the device of its first argument current: Triton launches on that one."""

    @functools.wraps(launch)
    def launched(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.cuda.device_of(x):
            return launch(x, *args, **kwargs)

    return launched


def pays_to_transpose(x: Tensor) -> bool:
    """Whether token-major `x`, read or written feature by feature, is better transposed first."""
    return x.shape[0] >= MIN_TRANSPOSED_TOKENS


def readable(x: Tensor, run: int) -> Tensor:
    """`x`, or a copy in the layout in which aligned runs of `run` features are best read."""
    if has_aligned_rows(x.t()):
        return x
    if run < MIN_RUN and pays_to_transpose(x):
        return aligned_features(x).t()
    return x.contiguous()


def shared(x: Tensor, run: int, backend: str) -> Tensor:
    """`x`, or the copy of it that every pass on this backend would make."""
    return readable(x, run) if _prefers_triton(x, backend) else x


def _prefers_triton(x: Tensor, backend: str) -> bool:
    # Triton has no float64 matrix instructions.
    return backend in ("triton", "cuda") and x.dtype != torch.float64
