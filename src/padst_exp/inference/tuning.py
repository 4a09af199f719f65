"""The fastest form of every layer of a loaded model, and of the model, by measurement."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor, nn

from padst_exp.dispatch import Input, Pick, agrees, device_name, inputs_of, is_recording, timings
from padst_exp.inference.blocks import TOKENS
from padst_exp.inference.convert import feature_stack, stack_name
from padst_exp.inference.features import DenseFeatureLinear, FeatureLinear, Fusion
from padst_exp.inference.graphs import graphed
from padst_exp.inference.linear import PackedLinear
from padst_exp.inference.measuring import fastest_feature_layer, fastest_layers
from padst_exp.layers.views import replace_module
from padst_kernels import Backend


@dataclass(frozen=True)
class TuningReport:
    """What `tune` measured and picked.

    Args:
        device: the model of the GPU or CPU.
        form: "token-major", "feature-major" (blocks), or "dense" (all layers), the fastest.
        seconds: of one forward pass of the whole model in each of them.
        compiled: whether it was compiled for that.
        captured: whether it was captured for that.
        layers: of the token-major model by name, those that the example does not call left out.
        feature_layers: of the feature-major blocks by name.
        note: why there are no feature-major blocks; empty where there are.
    """

    device: str
    form: str
    seconds: dict[str, float]
    compiled: bool
    captured: bool
    layers: dict[str, Pick]
    feature_layers: dict[str, Pick]
    note: str

    @property
    def speedup(self) -> float:
        """Time of the dense model over the time of this one."""
        return self.seconds["dense"] / self.seconds[self.form]

    def __str__(self) -> str:
        rows = {"token-major": self.layers, "feature-major": self.feature_layers}
        lines = [
            f"{name}: {row.backend}, {row.speedup:.2f}x dense ({row.tokens} tokens, {row.dtype})"
            for name, row in rows.get(self.form, {}).items()
        ]
        times = ", ".join(f"{name} {1e3 * time:.3g} ms" for name, time in self.seconds.items())
        lines.append(f"whole model: {self.form}, {self.speedup:.2f}x dense ({times})")
        if self.note:
            lines.append(f"no feature-major blocks: {self.note}")
        return "\n".join(lines)


@torch.no_grad()
def tune(
    model: nn.Module,
    example: Tensor,
    *,
    compiled: bool = False,
    captured: bool = False,
    backends: Collection[Backend] = get_args(Backend),
) -> TuningReport:
    """Give a loaded model the form that is fastest for inputs like `example`.

    Every layer is measured at the shapes it meets in a forward pass of `example`, and one that is
    slower than dense becomes dense. Then the whole model is measured against its form with
    feature-major blocks and against the dense model. What does not compute what dense layers do is
    not used. Timings are kept on disk, see `dispatch.timings`: tuning the like again on this
    machine measures nothing. To tune for another shape, load the model again.

    Args:
        model: from `load`, on its device and in its dtype; changed in place.
        example: an input of the shape to come.
        compiled: measure whole models as `torch.compile` makes them. It is up to the caller to
            compile what comes out.
        captured: measure whole models as `graphed` makes them, for small batches on a GPU. It is
            up to the caller to capture what comes out.
        backends: that may run beside dense; those of another device do not count.

    Raises:
        ValueError: called in the middle of a compilation or a capture, or `captured` without a
            GPU.
    """
    device = example.device
    autocast = torch.is_autocast_enabled(device.type)
    if is_recording(device):
        raise ValueError("tune measures; call it before compiling or capturing the model")
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    inputs = inputs_of(lambda: model(example), packed)
    # Attention reads the weights of its layers: they multiply as dense ones in any case.
    twins = {
        name: layer.dense()
        for name, layer in packed.items()
        if name in inputs
        or isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    }
    dense = with_modules(model, twins)
    layers = {name: packed[name] for name in inputs}
    picks = fastest_layers(layers, twins, inputs, backends)
    stack, feature_layers, note = _feature_stack(model, inputs, autocast, backends)
    for name, twin in twins.items():
        backend = picks[name].backend if name in picks else "dense"
        if backend == "dense":
            replace_module(model, model.get_submodule(name), twin)
        else:
            packed[name].backend = backend

    forms = {"dense": dense}
    if any(pick.backend != "dense" for pick in picks.values()):
        forms["token-major"] = model
    if stack is not None:
        form = with_modules(model, {stack_name(model): stack})
        if agrees("feature-major", lambda: [form(example)], [dense(example)]):
            forms["feature-major"] = form
        else:
            note = "they compute something else here"
    seconds = timings(
        {
            "models": hashlib.sha256(repr(forms).encode()).hexdigest(),
            "parameters": sorted({str(parameter.dtype) for parameter in model.parameters()}),
            "input": [*example.shape],
            "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else None,
            "compiled": compiled,
            "captured": captured,
        },
        lambda: {name: _call(form, example, compiled, captured) for name, form in forms.items()},
        device=device,
    )
    fastest = min(seconds, key=seconds.__getitem__)
    if fastest == "dense":
        for name, twin in twins.items():
            replace_module(model, model.get_submodule(name), twin)
    elif stack is not None and fastest == "feature-major":
        model.set_submodule(stack_name(model), stack)
    return TuningReport(
        device=device_name(device),
        form=fastest,
        seconds=seconds,
        compiled=compiled,
        captured=captured,
        layers=picks,
        feature_layers=feature_layers,
        note=note,
    )


def with_modules(model: nn.Module, changes: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of `model` with other modules by name; all other parameters are those of `model`."""
    shared = [*model.parameters(), *model.buffers()]
    changed = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for name, module in changes.items():
        replace_module(changed, changed.get_submodule(name), module)
    return changed


def _call(form: nn.Module, example: Tensor, compiled: bool, captured: bool) -> Callable[[], object]:
    run = cast(nn.Module, torch.compile(form, dynamic=False)) if compiled else form
    run = graphed(run, example) if captured else run

    def once() -> object:
        with torch.no_grad():
            return run(example)

    return once


def _feature_stack(
    model: nn.Module,
    inputs: Mapping[str, list[Input]],
    autocast: bool,
    backends: Collection[Backend],
) -> tuple[nn.Module | None, dict[str, Pick], str]:
    """Feature-major blocks of the fastest products, what these are, and why if there are none."""
    picks: dict[str, Pick] = {}

    def build(name: str, layer: PackedLinear | nn.Linear, fusion: Fusion) -> FeatureLinear:
        if not isinstance(layer, PackedLinear):
            return DenseFeatureLinear(layer, fusion)
        if name not in inputs:
            raise ValueError("the example does not reach them")
        tokens = -(-inputs[name][0].tokens // TOKENS) * TOKENS
        form, picks[name] = fastest_feature_layer(layer, fusion, tokens, backends)
        return form

    if autocast:
        return None, {}, "they have one dtype, that of their weights, and autocast is on"
    try:
        return feature_stack(model, build), picks, ""
    except ValueError as error:
        return None, {}, str(error)
