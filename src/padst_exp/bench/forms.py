"""Names of the kernels of sparse products: what tables, checks and refusals call them."""

from __future__ import annotations

from math import inf
from typing import Literal

import torch

from padst_exp.structures import Backend
from padst_kernels.entries.passes import MAX_TRITON_TOKENS

Inference = Literal["torch", "triton"]


def packed(backend: Backend) -> str:
    """The product of training."""
    # "dense" multiplies by a dense weight that lives during a pass only.
    return "packed, scattered" if backend == "dense" else f"packed, {backend}"


TRITON, CUDA = packed("triton"), packed("cuda")
# Stands for all kernels of a structure.
EVERY = "every kernel"
FEATURES: dict[Inference, str] = {"torch": "features, torch", "triton": "features, triton"}
CONDENSED: dict[Inference, str] = {"torch": "condensed", "triton": "condensed, triton"}


def condensed(device: torch.device) -> dict[Inference, float]:
    """Backends of condensed products, and the most tokens that each is for."""
    if device.type == "cpu":
        return {"torch": inf}
    # Beyond, plain PyTorch sums a few tokens at a time.
    return {"torch": MAX_TRITON_TOKENS, "triton": MAX_TRITON_TOKENS}
