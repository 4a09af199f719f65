"""What else there is for sparse layers, in the same rows: the sparse formats of PyTorch itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from padst_exp.structures import Block, Structure


@dataclass(frozen=True)
class Peer:
    """One format.

    Args:
        form: its name in tables.
        structure: of the weight, where the format brings its own ("2:4"); else "".
        make: dense weight `[O, I]`, zeros included, to what `product` takes.
        product: x `[T, I]` and the weight to y `[T, O]`, in any layout.
        backward: whether a gradient of the weight can be asked for.
    """

    form: str
    structure: str
    make: Callable[[Tensor], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]
    backward: bool


def peers(
    structure: Structure, device: torch.device, dtype: torch.dtype
) -> tuple[list[Peer], dict[str, str]]:
    """Formats for weights of a structure, and why others are not there, by their names."""
    found, missing = [], {}
    if isinstance(structure, Block):
        size = structure.size

        def blocks(weight: Tensor) -> Tensor:
            return weight.to_sparse_bsr((size, size))

        if device.type == "cpu" and dtype != torch.float32:
            missing["torch BSR"] = "its CPU path knows single precision only"
        else:
            # The Triton path of PyTorch is behind `linear`.
            product = linear if device.type == "cuda" else _weight_first
            found.append(Peer("torch BSR", "", blocks, product, False))
    if type(structure).__name__ == "Unstructured":
        if device.type == "cpu" and dtype != torch.float32:
            missing["torch CSR"] = "its CPU path knows single precision only"
        else:
            found.append(Peer("torch CSR", "", Tensor.to_sparse_csr, _weight_first, True))
    return found, missing


def semi_structured(device: torch.device, dtype: torch.dtype) -> Peer | str:
    """2:4, or why it is not there."""
    if device.type != "cuda":
        return "needs a GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"does not know {str(dtype).removeprefix('torch.')}"
    return Peer("torch 2:4", "2:4", _semi_structured, linear, False)


def masked(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The masked dense layer: what sparse training is in most code bases."""
    return linear(x, weight * mask)


def _weight_first(x: Tensor, weight: Tensor) -> Tensor:
    # Several times as fast as `linear`, and y comes feature-major.
    return torch.sparse.mm(weight, x.t()).t()


def _semi_structured(weight: Tensor) -> Tensor:
    quads = weight.view(-1, 4)
    keep = quads.abs().topk(2, dim=1).indices
    pruned = torch.zeros_like(quads).scatter(1, keep, quads.gather(1, keep))
    return torch.sparse.to_sparse_semi_structured(pruned.view_as(weight))
