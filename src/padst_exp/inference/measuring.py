"""The fastest form of single layers, by measurement at given inputs."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from padst_exp.dispatch import Input, Pick, fastest_right
from padst_exp.dispatch.agreement import Call
from padst_exp.dispatch.inputs import random
from padst_exp.inference.features import (
    DenseFeatureLinear,
    FeatureLinear,
    Fusion,
    TiledFeatureLinear,
)
from padst_exp.inference.linear import PackedLinear
from padst_kernels import Backend, is_here

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
        generator = torch.Generator(weight.device).manual_seed(0)
        pick = _pick(
            {
                "layer": repr(layer),
                "weights": str(weight.dtype),
                "inputs": [repr(one) for one in given],
                "rotated": len(rotated),
            },
            [twins[name] for name in rotated],
            {
                backend: [_by(backend, layers[name]) for name in rotated]
                for backend in _backends(layer, allowed)
            },
            [one.random(generator) for one in given],
            tokens=sum(one.tokens for one in given),
        )
        seconds = {form: time / len(rotated) for form, time in pick.seconds.items()}
        picks.update(dict.fromkeys(names, replace(pick, seconds=seconds)))
    return {name: picks[name] for name in layers}


def fastest_feature_layer(
    layer: PackedLinear, fusion: Fusion, tokens: int, allowed: Collection[Backend]
) -> tuple[FeatureLinear, Pick]:
    """The fastest form of one product of a feature-major block, and what was measured."""
    dense = DenseFeatureLinear(layer, fusion)
    forms = {
        backend: TiledFeatureLinear(layer, backend, fusion) for backend in _backends(layer, allowed)
    }
    dtype, generator = dense.weight.dtype, torch.Generator(dense.weight.device).manual_seed(0)
    x = random((tokens, layer.in_features), dtype, generator)
    if fusion.reads_feature_major:
        x = x.t().contiguous().t()
    residual = statistics = None
    if fusion.residual:
        residual = random((layer.out_features, tokens), dtype, generator).t()
    if fusion.norm is not None:
        statistics = (x.float().mean(1), x.float().std(1).reciprocal())

    def form_of(form: FeatureLinear) -> Form:
        return lambda x: form(x, residual, statistics)

    pick = _pick(
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
            "dtype": str(dtype),
        },
        [form_of(dense)],
        {backend: [form_of(form)] for backend, form in forms.items()},
        [x],
        tokens=tokens,
    )
    return (dense if pick.backend == "dense" else forms[pick.backend]), pick


def _backends(layer: PackedLinear, allowed: Collection[Backend]) -> list[Backend]:
    return [one for one in layer.backends() if one in allowed and is_here(one)]


def _by(backend: Backend, layer: PackedLinear) -> PackedLinear:
    form = copy.copy(layer)
    form.backend = backend
    return form


def _pick(
    what: Mapping[str, object],
    dense: Sequence[Form],
    forms: Mapping[Backend, Sequence[Form]],
    inputs: Sequence[Tensor],
    *,
    tokens: int,
) -> Pick:
    """The fastest of `forms`, or `dense`; what does not compute the same does not count."""

    def call(layers: Sequence[Form]) -> Call:
        def once() -> list[Tensor]:
            with torch.no_grad():
                return [layer(x) for layer in layers for x in inputs]

        return once

    calls = {backend: call(layers) for backend, layers in forms.items()}
    truth = call(dense)()
    key = {"pass": "inference", "backends": [*forms], **what}
    backend, seconds = fastest_right(key, calls, call(dense), truth, device=inputs[0].device)
    slow = backend is None or seconds["dense"] <= seconds[backend]
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    return Pick("dense" if backend is None or slow else backend, tokens, dtype, seconds)
