"""From a trained model to packed layers, or to plain dense weights with zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from padst_exp.inference.files import Layer
from padst_exp.inference.linear import (
    ConcatenatedLinear,
    CondensedLinear,
    PackedLinear,
    TiledLinear,
)
from padst_exp.layers import SparseLinear, SparseWeight, permutations
from padst_exp.structures import Folding, permuted_tiles, runs
from padst_kernels.entries import condense


@torch.no_grad()
def pack(model: nn.Module) -> dict[str, Layer]:
    """Replace every sparse layer of a trained `model` by a packed one, in place.

    Args:
        model: all its permutations hard.

    Returns:
        A description of each new layer by name, in plain data; `files.empty_layer` reads it.

    Raises:
        ValueError: a permutation is still soft.
    """
    for name, permutation in permutations(model).items():
        if permutation.soft:
            raise ValueError(f"pack: {name} is still soft; call its harden() first")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    described = {}
    for name, layer in layers.items():
        packed = packed_layer(layer)
        described[name] = describe(layer, packed)
        model.set_submodule(name, packed)
    model.eval().requires_grad_(False)
    return described


def packed_layer(layer: SparseLinear) -> PackedLinear | ConcatenatedLinear:
    """The inference form of one layer: topology and hard permutations folded into its indices."""
    weights, folding = layer.parts(), layer.folding()
    parts: list[PackedLinear] = []
    start = 0
    for part in runs(folding, "packed"):
        stop = start + folding[part].out_features
        bias = layer.live_bias()
        bias = None if bias is None else bias[start:stop].clone()
        parts.append(_packed(folding[part], weights[part], bias))
        start = stop
    return parts[0] if len(parts) == 1 else ConcatenatedLinear(parts)


def describe(layer: SparseLinear, packed: nn.Module) -> Layer:
    """What `files.empty_layer` needs to make the like of `packed`, and what to know of it."""
    entries = sum(weight.topology().num_entries for weight in layer.parts())
    parts = packed.parts if isinstance(packed, ConcatenatedLinear) else [packed]
    return {
        "in_features": layer.in_features,
        "density": entries / (layer.in_features * layer.out_features),
        "parts": [
            {
                "kind": "tiles" if isinstance(part, TiledLinear) else "entries",
                "out_features": part.out_features,
            }
            for part in parts
            if isinstance(part, PackedLinear)
        ],
    }


@torch.no_grad()
def dense_state(model: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """The state of `model`, whose layers are packed, as the dense model `plain` would have it.

    Args:
        model: after `pack`.
        plain: the same model before `sparsify`, on any device (meta too); says what is transposed.
    """
    state = dict(model.state_dict())
    for name, layer in _packed_layers(model).items():
        for key in layer.state_dict():
            del state[f"{name}.{key}"]
        weight, bias = _dense(layer)
        # transformers' Conv1D stores its weight as [I, O].
        transposed = not isinstance(plain.get_submodule(name), nn.Linear)
        state[f"{name}.weight"] = weight.t().contiguous() if transposed else weight
        if bias is not None:
            state[f"{name}.bias"] = bias
    return state


def _packed_layers(model: nn.Module) -> dict[str, PackedLinear | ConcatenatedLinear]:
    """Packed layers by name, those inside a concatenation left out."""
    found: dict[str, PackedLinear | ConcatenatedLinear] = {}
    for name, module in model.named_modules():
        inside = name.rpartition(".parts.")[0] in found
        if isinstance(module, PackedLinear | ConcatenatedLinear) and not inside:
            found[name] = module
    return found


def _dense(layer: PackedLinear | ConcatenatedLinear) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, PackedLinear):
        return layer.dense_weight(), layer.bias
    parts = [part for part in layer.parts if isinstance(part, PackedLinear)]
    biases = [part.bias for part in parts if part.bias is not None]
    weight = torch.cat([part.dense_weight() for part in parts])
    return weight, torch.cat(biases) if biases else None


def _packed(folding: Folding, weights: Sequence[SparseWeight], bias: Tensor | None) -> PackedLinear:
    if folding.geometries[0].tiling() is None:
        values = torch.cat([weight.packed().flatten() for weight in weights])
        size = folding.out_features, folding.in_features
        return CondensedLinear(condense(values, folding.permuted_entries, *size), bias)
    index, width = permuted_tiles(folding)
    tiles = [w.packed().reshape(-1, width, w.geometry.frame[2]) for w in weights]
    return TiledLinear(torch.cat(tiles), index, folding.out_features, bias)
