"""From a trained model to packed layers, or to plain dense weights with zeros."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from padst_exp.inference import files
from padst_exp.inference.files import Layer
from padst_exp.inference.linear import PackedConv2d, PackedLinear
from padst_exp.inference.weights import PackedEntries, PackedTiles, PackedWeight
from padst_exp.layers import SparseConv2d, SparseLinear, SparseWeight, sparse_layers, sparse_weights
from padst_exp.layers.views import replace_module, view_of
from padst_exp.soft import soft_choices
from padst_exp.structures import Folding, permuted_tiles, runs
from padst_kernels.entries import condense


def harden(model: nn.Module) -> list[str]:
    """Let what is still soft in `model` become the nearest hard choice; returns the names."""
    soft = soft_choices(model)
    for choice in soft.values():
        choice.harden()
    for weight in sparse_weights(model).values():
        if (change := weight.settle()) is not None:
            weight.adopt(change)
    return sorted(soft)


@torch.no_grad()
def pack(model: nn.Module) -> dict[str, Layer]:
    """Replace every sparse layer of a trained `model` by a packed one, in place.

    Args:
        model: all its permutations and selections hard, see `harden`.

    Returns:
        A description of each new layer by name, in plain data; `files.empty_layer` reads it.

    Raises:
        ValueError: a choice is still soft.
    """
    for name in soft_choices(model):
        raise ValueError(f"pack: {name} is still soft; call harden() first")
    described = {}
    for name, layer in sparse_layers(model).items():
        packed = packed_layer(layer)
        described[name] = _describe(layer, packed)
        replace_module(model, layer, packed)
    model.eval().requires_grad_(False)
    return described


def save(model: nn.Module, path: Path | str, *, overwrite: bool = False) -> None:
    """Write a trained `model` packed, for `load(path, model=...)` with a dense model like it.

    `python -m padst_exp.export` does so for runs. The model itself stays as it is.

    Args:
        model: all its permutations and selections hard, see `harden`.
        path: the folder to make.
        overwrite: whether an earlier export may be replaced.

    Raises:
        UserError: the folder exists and may not be replaced, or the disk is full.
        ValueError: a choice is still soft.
    """
    folder, kind = Path(path), type(model)
    files.require_free(folder, overwrite=overwrite)
    packed = copy.deepcopy(model)
    description = {
        "kind": "packed",
        "model": {"_target_": f"{kind.__module__}.{kind.__qualname__}", "arguments": {}},
        "layers": pack(packed),
        "config": "",
    }
    files.write(folder, packed.state_dict(), description, extra={}, overwrite=overwrite)


@torch.no_grad()
def packed_layer(layer: SparseLinear) -> PackedLinear:
    """The inference form of one layer: topology and hard permutations folded into its indices."""
    weights, folding = layer.parts(), layer.folding()
    parts = [_packed(folding[part], weights[part]) for part in runs(folding, "packed")]
    rest = layer.bias, copy.deepcopy(layer.companion)
    if isinstance(layer, SparseConv2d):
        return PackedConv2d(layer.window, parts, *rest)
    return PackedLinear(parts, *rest)


def _packed(folding: Folding, weights: Sequence[SparseWeight]) -> PackedWeight:
    if folding.geometries[0].tiling() is None:
        values = torch.cat([weight.packed().flatten() for weight in weights])
        size = folding.out_features, folding.in_features
        return PackedEntries(condense(values, folding.permuted_entries, *size))
    index, width = permuted_tiles(folding)
    tiles = [w.packed().reshape(-1, width, w.geometry.frame[2]) for w in weights]
    return PackedTiles(torch.cat(tiles), index, folding.out_features)


def _describe(layer: SparseLinear, packed: PackedLinear) -> Layer:
    """What `files.empty_layer` needs to make the like of `packed`, and what to know of it."""
    entries = sum(weight.topology().num_entries for weight in layer.parts())
    return {
        "in_features": layer.in_features,
        "density": entries / (layer.in_features * layer.out_features),
        "rank": 0 if layer.companion is None else layer.companion.up.shape[1],
        "parts": [
            {
                "kind": "tiles" if isinstance(part, PackedTiles) else "entries",
                "out_features": part.out_features,
            }
            for part in packed.weights()
        ],
    }


@torch.no_grad()
def dense_state(model: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """The state of `model`, whose layers are packed, as the dense model `plain` would have it.

    Args:
        model: after `pack`.
        plain: the same model before `sparsify`, on any device (meta too); says what its layers
            call their weights, and how these lie.
    """
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        for key in layer.state_dict():
            del state[f"{name}.{key}"]
        owner, found = view_of(plain, name)
        state[f"{owner}.{found.weight}"] = found.restore(layer.matrix())
        if layer.bias is not None:
            state[f"{owner}.{found.bias}"] = layer.bias
    return state
