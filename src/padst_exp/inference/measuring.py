"""The fastest form of single layers, by measurement at given inputs."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from padst_exp.dispatch import Input, Pick, agrees, timings
from padst_exp.dispatch.inputs import random
from padst_exp.inference.features import (
    DenseFeatureLinear,
    FeatureLinear,
    Fusion,
    TiledFeatureLinear,
)
from padst_exp.inference.linear import PackedLinear
from padst_kernels import Backend

Form = Callable[[Tensor], Tensor]

# Alike layers are multiplied in turn, up to so many bytes of dense weights: more than a cache
# holds, as when a whole model runs.
ROTATED = 1 << 28


def fastest_layers(
    layers: Mapping[str, PackedLinear],
    twins: Mapping[str, nn.Module],
    inputs: Mapping[str, list[Input]],
    allowed: Collection[Backend],
) -> dict[str, Pick]:
    """The fastest form of each of `layers`.

    Args:
        layers: by name.
        twins: their dense forms.
        inputs: of each, see `dispatch.inputs_of`.
        allowed: backends that may run beside dense.
    """
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, layer in layers.items():
        alike[(repr(layer), *inputs[name])].append(name)
    picks: dict[str, Pick] = {}
    for names in alike.values():
        layer, given = layers[names[0]], inputs[names[0]]
        weight = next(twins[names[0]].parameters())
        rotated = names[: max(1, ROTATED // (weight.numel() * weight.element_size()))]
        forms: dict[str, list[Form]] = {"dense": [twins[name] for name in rotated]}
        for backend in _backends(layer, allowed):
            forms[backend] = [_by(backend, layers[name]) for name in rotated]
        generator = torch.Generator(weight.device).manual_seed(0)
        seconds = _seconds(
            {
                "layer": repr(layer),
                "weights": str(weight.dtype),
                "inputs": [repr(one) for one in given],
                "rotated": len(rotated),
            },
            forms,
            [one.random(generator) for one in given],
        )
        seconds = {form: time / len(rotated) for form, time in seconds.items()}
        tokens = sum(one.tokens for one in given)
        for name in names:
            picks[name] = _pick(tokens, given[0].dtype_name, seconds)
    return {name: picks[name] for name in layers}


def fastest_feature_layer(
    layer: PackedLinear, fusion: Fusion, tokens: int, allowed: Collection[Backend]
) -> tuple[FeatureLinear, Pick]:
    """The fastest form of one product of a feature-major block, and what was measured."""
    forms: dict[str, FeatureLinear] = {"dense": DenseFeatureLinear(layer, fusion)}
    for backend in _backends(layer, allowed):
        forms[backend] = TiledFeatureLinear(layer, backend, fusion)
    weight = forms["dense"].weight
    generator = torch.Generator(weight.device).manual_seed(0)
    x = random((tokens, layer.in_features), weight.dtype, generator)
    if fusion.reads_feature_major:
        x = x.t().contiguous().t()
    residual = statistics = None
    if fusion.residual:
        residual = random((layer.out_features, tokens), weight.dtype, generator).t()
    if fusion.norm is not None:
        statistics = (x.float().mean(1), x.float().std(1).reciprocal())

    def form_of(form: FeatureLinear) -> Form:
        return lambda x: form(x, residual, statistics)

    seconds = _seconds(
        {
            "layer": repr(layer),
            "fusion": [
                fusion.norm is not None,
                fusion.gelu,
                fusion.feature_major,
                fusion.reads_feature_major,
                fusion.residual,
            ],
            "tokens": tokens,
            "dtype": str(weight.dtype),
        },
        {kind: [form_of(form)] for kind, form in forms.items()},
        [x],
    )
    pick = _pick(tokens, str(weight.dtype).removeprefix("torch."), seconds)
    return forms[pick.backend], pick


def _backends(layer: PackedLinear, allowed: Collection[Backend]) -> list[Backend]:
    return [backend for backend in layer.backends() if backend in allowed]


def _by(backend: Backend, layer: PackedLinear) -> PackedLinear:
    form = copy.copy(layer)
    form.backend = backend
    return form


def _seconds(
    what: Mapping[str, object], forms: Mapping[str, list[Form]], inputs: Sequence[Tensor]
) -> dict[str, float]:
    """Times of the dense form, and of those others that compute the same."""

    def call(layers: list[Form]) -> Callable[[], list[Tensor]]:
        def once() -> list[Tensor]:
            with torch.no_grad():
                return [layer(x) for layer in layers for x in inputs]

        return once

    def candidates() -> dict[str, Callable[[], list[Tensor]]]:
        calls = {name: call(layers) for name, layers in forms.items()}
        dense = calls.pop("dense")
        expected = dense()
        right = {name: once for name, once in calls.items() if agrees(name, once, expected)}
        return {"dense": dense, **right}

    key = {"pass": "inference", "forms": [*forms], **what}
    return timings(key, candidates, device=inputs[0].device)


def _pick(tokens: int, dtype: str, seconds: Mapping[str, float]) -> Pick:
    fastest = min(seconds, key=seconds.__getitem__)
    return Pick(cast(Backend, fastest), tokens, dtype, seconds)
