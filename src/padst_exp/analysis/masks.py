"""The masks of a model as plain matrices, permutations applied where they matter."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from padst_exp.layers import SparseLinear, SparseWeight, sparse_layers

# Sparse layers beside the path that features take from one block to the next: shortcuts, what only
# decides attention, the gated half of an MLP.
_BESIDE = ("*.downsample.*", "*.q_proj", "*.k_proj", "*.up_proj")


def mask(weight: SparseWeight) -> Tensor:
    """Bool `[O, I]`, the active entries of one weight; no permutation applied."""
    rows, columns = weight.shape
    flat = torch.zeros(rows * columns + 1, dtype=torch.bool, device=weight.active.device)
    flat[weight.entries().flatten()] = True
    return flat[:-1].view(rows, columns)


def connections(layer: SparseLinear, *, permuted: bool = True) -> list[Tensor]:
    """Which input feature reaches which output, bool `[O, C]`, for each weight of a layer.

    Args:
        layer: of a convolution, a channel is reached at any position of the kernel.
        permuted: apply permutations, soft ones as the permutation nearest to them.
    """
    found = []
    permutations = layer.permutations() if permuted else {}
    inputs = permutations.get(("in", 0))
    for part, weight in enumerate(layer.parts()):
        matrix = mask(weight).unflatten(1, (layer.taps, -1)).any(1)
        outputs = permutations.get(("out", part))
        matrix = matrix if outputs is None else matrix[outputs.nearest()]
        matrix = matrix if inputs is None else matrix[:, inputs.nearest().argsort()]
        found.append(matrix)
    return found


def consecutive(model: nn.Module, *, permuted: bool = True) -> dict[str, Tensor]:
    """The connections of sparse layers that follow each other, bool `[O, C]` by layer name.

    Residual paths are left out, and so is what does not fit the width before it, such as the
    mixing of tokens. Of a fused Q, K and V it is V; branches of one layer count together.
    """
    chain: dict[str, Tensor] = {}
    for name, layer in sparse_layers(model).items():
        if any(fnmatchcase(name, pattern) for pattern in _BESIDE):
            continue
        matrix = connections(layer, permuted=permuted)[-1]
        together, branch, _ = name.partition(".branches.")
        if branch and together in chain:
            chain[together] = chain[together] | matrix
        elif not chain or len(next(reversed(chain.values()))) == matrix.shape[1]:
            chain[together] = matrix
    return chain
