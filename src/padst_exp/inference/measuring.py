"""The fastest form of single layers, by measurement at given inputs."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.dispatch import Decision, agrees, fastest
from padst_exp.inference.features import (
    Around,
    DenseFeatureLinear,
    FeatureLinear,
    TiledFeatureLinear,
)
from padst_exp.inference.linear import PackedLinear, TiledLinear

Backend = Literal["torch", "triton"]

# Alike layers are multiplied in turn, up to so many bytes of dense weights: more than a cache
# holds, as when a whole model runs.
ROTATED = 1 << 28


@dataclass(frozen=True)
class LayerChoice:
    """How one layer is computed.

    Args:
        name: of its module.
        choice: "torch" or "triton", what computes the packed weight, or "dense".
        tokens: that it multiplies in one forward pass of the example.
        dtype: of the product, e.g. "bfloat16".
        seconds: that each candidate takes for them.
    """

    name: str
    choice: str
    tokens: int
    dtype: str
    seconds: dict[str, float]

    @property
    def speedup(self) -> float:
        """Time of a dense layer over the time of this one."""
        return self.seconds["dense"] / self.seconds[self.choice]


@dataclass(frozen=True)
class Input:
    """What a layer was given: sizes, whether contiguous, dtype of the product."""

    shape: tuple[int, ...]
    contiguous: bool
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Vectors that the layer multiplies."""
        return torch.Size(self.shape).numel() // self.shape[-1]

    def random(self, device: torch.device) -> Tensor:
        """Another such input."""
        x = _random(*self.shape, dtype=self.dtype, device=device)
        # Token mixing gets its input transposed.
        return x if self.contiguous else x.transpose(-1, -2).contiguous().transpose(-1, -2)


def inputs_of(
    model: nn.Module, example: Tensor, layers: Mapping[str, PackedLinear]
) -> dict[str, list[Input]]:
    """The inputs of `layers` in one forward pass; layers that it does not reach are left out."""
    seen: dict[str, list[Input]] = defaultdict(list)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            autocast = torch.is_autocast_enabled(x.device.type)
            dtype = (
                torch.get_autocast_dtype(x.device.type) if autocast else layers[name].weight.dtype
            )
            seen[name].append(Input(tuple(x.shape), x.is_contiguous(), dtype))

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(watch(name)).remove)
        model(example)
    return seen


def fastest_layers(
    layers: Mapping[str, PackedLinear],
    twins: Mapping[str, nn.Linear],
    inputs: Mapping[str, list[Input]],
    backends: Sequence[Backend],
) -> dict[str, LayerChoice]:
    """The fastest form of each of `layers`.

    Args:
        layers: by name.
        twins: their dense forms.
        inputs: from `inputs_of`.
        backends: that may run beside dense.
    """
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, layer in layers.items():
        alike[(repr(layer), layer.bias is None, *inputs[name])].append(name)
    chosen: dict[str, LayerChoice] = {}
    for names in alike.values():
        weight, given = twins[names[0]].weight, inputs[names[0]]
        rotated = names[: max(1, ROTATED // (weight.numel() * weight.element_size()))]
        forms = _forms(
            [layers[name] for name in rotated], [twins[name] for name in rotated], backends
        )
        decision = _fastest(
            {
                "layer": repr(layers[names[0]]),
                "bias": layers[names[0]].bias is not None,
                "weights": str(weight.dtype),
                "inputs": [repr(one) for one in given],
                "rotated": len(rotated),
            },
            forms,
            [one.random(weight.device) for one in given],
        )
        seconds = {form: time / len(rotated) for form, time in decision.seconds.items()}
        tokens = sum(one.tokens for one in given)
        dtype = str(given[0].dtype).removeprefix("torch.")
        for name in names:
            chosen[name] = LayerChoice(name, decision.choice, tokens, dtype, seconds)
    return {name: chosen[name] for name in layers}


def fastest_feature_layer(
    name: str, layer: TiledLinear, around: Around, tokens: int, backends: Sequence[Backend]
) -> tuple[FeatureLinear, LayerChoice]:
    """The fastest form of one product of a feature-major block, and what was measured."""
    forms: dict[str, FeatureLinear] = {"dense": DenseFeatureLinear(layer, around)}
    for backend in _backends(layer.weight.device, backends):
        forms[backend] = TiledFeatureLinear(layer, backend, around)
    dtype, device = layer.weight.dtype, layer.weight.device
    x = _random(tokens, layer.in_features, dtype=dtype, device=device)
    if around.reads_feature_major:
        x = x.t().contiguous().t()
    residual = statistics = None
    if around.residual:
        residual = _random(layer.out_features, tokens, dtype=dtype, device=device).t()
    if around.norm is not None:
        statistics = (x.float().mean(1), x.float().std(1).reciprocal())

    def form_of(form: FeatureLinear) -> Form:
        return lambda x: form(x, residual, statistics)

    decision = _fastest(
        {
            "layer": repr(layer),
            "around": [
                around.norm is not None,
                around.gelu,
                around.feature_major,
                around.reads_feature_major,
                around.residual,
            ],
            "tokens": tokens,
            "dtype": str(dtype),
        },
        {kind: [form_of(form)] for kind, form in forms.items()},
        [x],
    )
    short = str(dtype).removeprefix("torch.")
    choice = LayerChoice(name, decision.choice, tokens, short, decision.seconds)
    return forms[decision.choice], choice


Form = Callable[[Tensor], Tensor]


def _forms(
    layers: list[PackedLinear], twins: list[nn.Linear], backends: Sequence[Backend]
) -> dict[str, list[Form]]:
    forms: dict[str, list[Form]] = {"dense": [*twins]}
    for backend in _backends(layers[0].weight.device, backends):
        forms[backend] = []
        for layer in layers:
            form = copy.copy(layer)
            form.backend = backend
            forms[backend].append(form)
    return forms


def _backends(device: torch.device, allowed: Sequence[Backend]) -> list[Backend]:
    return [name for name in allowed if name == "torch" or device.type == "cuda"]


def _fastest(
    what: Mapping[str, object], forms: Mapping[str, list[Form]], inputs: list[Tensor]
) -> Decision:
    def call(layers: list[Form]) -> Callable[[], list[Tensor]]:
        def once() -> list[Tensor]:
            with torch.no_grad():
                return [layer(x) for layer in layers for x in inputs]

        return once

    def candidates() -> dict[str, Callable[[], list[Tensor]]]:
        calls = {name: call(layers) for name, layers in forms.items()}
        dense = calls.pop("dense")
        expected = dense()
        agreeing = {name: once for name, once in calls.items() if agrees(name, once, expected)}
        return {"dense": dense, **agreeing}

    return fastest(
        {"pass": "inference", "forms": [*forms], **what},
        candidates,
        device=inputs[0].device,
    )


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # On the device: a CPU takes seconds for as many tokens as a GPU takes. Drawn in float32, since
    # not every device draws every dtype.
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)
