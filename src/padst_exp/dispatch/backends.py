"""Measured, forced or remembered: the backend of every sparse layer of a model in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from padst_exp.dispatch.agreement import Call, fastest_right
from padst_exp.dispatch.inputs import Input, inputs_of, random
from padst_exp.dispatch.timing import device_name
from padst_exp.errors import UserError, require
from padst_exp.layers import SparseConv2d, SparseLinear, sparse_layers
from padst_exp.soft import choices
from padst_exp.structures import tile_shape
from padst_kernels import Backend, is_here

# Ratios no longer change with more tokens, but measuring takes longer.
MAX_TOKENS = {"cpu": 1024, "cuda": 1 << 16}


@dataclass(frozen=True)
class Pick:
    """How one layer is computed, and the times that spoke for it.

    Args:
        backend: see `SparseLinear`; "dense" where a dense layer took its place (`inference.tune`).
        tokens: that were measured with, about those of a forward pass; 0 where nothing was.
        dtype: of the product, e.g. "bfloat16".
        seconds: of each backend that computes the right thing, and of a dense layer ("dense").
    """

    backend: Backend | Literal["dense"]
    tokens: int = 0
    dtype: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Time of a dense layer over the time of this one, as measured; None if never."""
        if not {"dense", self.backend} <= self.seconds.keys():
            return None
        return self.seconds["dense"] / self.seconds[self.backend]


def choose(
    model: nn.Module,
    example: Callable[[], object],
    *,
    samples: int,
    device: torch.device,
    compiled: bool,
    allowed: Collection[Backend] = get_args(Backend),
    kept: Mapping[str, Pick] | None = None,
) -> dict[str, Pick]:
    """Measure every kind of sparse layer of `model` and let each use its fastest right backend.

    Forward and backward together. A kernel that disagrees with a dense weight in plain PyTorch is
    not picked, whichever it is. Times are kept on disk, but the truth is asked anew each time.

    Args:
        model: on `device`; only its backends change.
        example: runs `model` on one sample, as training will.
        samples: in one forward pass of training.
        device: of the model.
        compiled: whether `torch.compile` will compile it; part of what timings are kept under.
        allowed: backends that may be picked.
        kept: picks of layers, by name, that keep theirs.

    Raises:
        ValueError: a layer has none of the `allowed` backends.
        UserError: none of them computes what a dense weight does.
    """
    # Nothing that is not proven yet runs in the example.
    forced(model, "torch", device)
    layers = sparse_layers(model)
    inputs = inputs_of(example, layers)
    picks: dict[str, Pick] = dict(kept or {})
    alike: dict[str, Pick] = {}
    for name, layer in layers.items():
        if name in picks:
            continue
        possible = [one for one in layer.backends(device) if one in allowed and is_here(one)]
        if not possible:
            raise ValueError(f"no backend is left of {layer.backends(device)}")
        if layer.storage == "masked" or name not in inputs:
            picks[name] = Pick("torch" if "torch" in possible else possible[0])
            continue
        given = _measured(layer, inputs[name][-1], samples, MAX_TOKENS[device.type])
        if given.dtype not in (torch.bfloat16, torch.float16):
            possible = [backend for backend in possible if backend != "semi_structured"]
        what = _description(layer, possible, given, compiled)
        if repr(what) not in alike:
            alike[repr(what)] = _fastest(what, layer, possible, given, device)
        picks[name] = alike[repr(what)]
    reuse(model, picks)
    return picks


def forced(model: nn.Module, backend: Backend, device: torch.device) -> dict[str, Pick]:
    """Use `backend` wherever a layer has it, what it usually has where not. Measures nothing.

    What no compiler makes is not picked: plain PyTorch is, which would stand in for it.

    Raises:
        UserError: see `require_device`.
    """
    require_device(backend, device)
    picks = {}
    layers = sparse_layers(model)
    somewhere = any(backend in layer.backends(device) for layer in layers.values())
    require(
        somewhere or backend != "semi_structured",
        "backend",
        backend,
        "one that a layer has: this multiplies 2:4 (structure=nm structure.n=2 structure.m=4) of a "
        "multiple of 32 outputs and 64 inputs, on a GPU of compute capability 8.0 or more",
    )
    for name, layer in layers.items():
        possible = layer.backends(device)
        # What only some layers have in CUDA, the others have in Triton.
        wanted = (backend, "triton") if backend == "cuda" else (backend,)
        ranked = [*(one for one in wanted if one in possible), *possible]
        picks[name] = Pick(next(one for one in ranked if is_here(one)))
    reuse(model, picks)
    return picks


def require_device(backend: str, device: torch.device) -> None:
    """Raise a UserError where `backend` runs on another kind of device only."""
    gpu = ("triton", "cuda", "semi_structured")
    on = {**dict.fromkeys(gpu, "cuda"), "native": "cpu"}.get(backend, device.type)
    what = "one for this device, a " + ("GPU" if device.type == "cuda" else "CPU")
    require(on == device.type, "backend", backend, f"{what} (auto, torch or scatter)")


def reuse(model: nn.Module, picks: Mapping[str, Pick]) -> None:
    """Let the layers of `model` use what was picked for them, by their module names."""
    for name, layer in sparse_layers(model).items():
        backend = picks[name].backend
        assert backend != "dense", name
        layer.use_backend(backend)


def save(picks: Mapping[str, Pick], device: torch.device) -> dict[str, Any]:
    """Plain data for a checkpoint."""
    return {
        "device": device_name(device),
        "picks": {name: asdict(pick) for name, pick in picks.items()},
    }


def restore(saved: object, model: nn.Module, device: torch.device) -> dict[str, Pick] | None:
    """The picks that `save` stored.

    Returns:
        By module name; None when they were made on a device of another model, or are not those of
        the layers of `model` on `device`.
    """
    if not isinstance(saved, Mapping) or saved.get("device") != device_name(device):
        return None
    try:
        picks = {name: Pick(**pick) for name, pick in saved["picks"].items()}
    except (AttributeError, KeyError, TypeError):
        return None
    layers = sparse_layers(model)
    fits = picks.keys() == layers.keys() and all(
        any(pick.backend == one and is_here(one) for one in layers[name].backends(device))
        for name, pick in picks.items()
    )
    return picks if fits else None


def _measured(layer: SparseLinear, sample: Input, samples: int, most: int) -> Input:
    """What to measure with: about a batch, in few different sizes, of at most so many tokens."""
    if isinstance(layer, SparseConv2d):
        number = min(_power_of_two(samples), max(1, most // sample.tokens))
        shape, tokens = (number, *sample.shape[1:]), number * sample.tokens
    else:
        tokens = min(_power_of_two(sample.tokens * samples), most)
        shape = tokens, layer.in_features
    return Input(shape, tuple(range(len(shape))), tokens, sample.dtype)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _description(
    layer: SparseLinear, backends: Sequence[Backend], given: Input, compiled: bool
) -> dict[str, object]:
    """All that the times of a layer depend on, in plain values."""
    return {
        "pass": "forward and backward",
        "layer": repr(layer.window) if isinstance(layer, SparseConv2d) else "linear",
        "weights": [
            [
                type(weight.geometry).__name__,
                *(weight.shape, weight.geometry.frame, len(weight.active)),
                # What units merge to, and whether their rows are scattered.
                tile_shape(weight.geometry, weight.active.long()),
                weight.row_order is not None,
            ]
            for weight in layer.parts()
        ],
        "permuted": sorted({side for side, _ in layer.permutations()}),
        "backends": list(backends),
        "input": repr(given),
        # Measured eagerly all the same: compiled code calls these very kernels.
        "compiled": compiled,
    }


def _fastest(
    what: Mapping[str, object],
    layer: SparseLinear,
    backends: Sequence[Backend],
    given: Input,
    device: torch.device,
) -> Pick:
    """The fastest right backend for forward and backward of layers like `layer`."""
    generator = torch.Generator(device).manual_seed(0)
    example = _example_of(layer, given.dtype, generator)
    x = given.random(generator).requires_grad_()
    y = example.dense_forward(x, example.weight)
    dy = random(y.shape, given.dtype, generator)
    values = [weight.values for weight in example.parts()]
    truth = (y.detach(), *torch.autograd.grad(y, (x, *values), dy))
    weight = example.weight.detach().clone().requires_grad_()

    def dense() -> Sequence[Tensor]:
        return torch.autograd.grad(example.dense_forward(x, weight), (x, weight), dy)

    candidates = {backend: _pass(example, backend, x, dy) for backend in backends}
    fastest, seconds = fastest_right(what, candidates, dense, truth, device=device)
    if fastest is None:
        raise UserError(
            f"backend: none of {', '.join(backends)} computes what a dense weight does, "
            "expected at least plain PyTorch; this is a fault of the installation"
        )
    return Pick(fastest, given.tokens, str(given.dtype).removeprefix("torch."), seconds)


def _pass(layer: SparseLinear, backend: Backend, x: Tensor, dy: Tensor) -> Call:
    """Forward and backward by one backend: y and the gradients of x and of all values."""
    own = copy.deepcopy(layer)
    values = [weight.values for weight in own.parts()]

    def call() -> Sequence[Tensor]:
        own.use_backend(backend)
        y = own(x)
        return (y.detach(), *torch.autograd.grad(y, (x, *values), dy))

    return call


@torch.no_grad()
def _example_of(
    layer: SparseLinear, dtype: torch.dtype, generator: torch.Generator
) -> SparseLinear:
    """A copy of `layer` with random values and permutations that are hard already."""
    example = copy.deepcopy(layer)
    example.register_parameter("bias", None)
    example.companion = None
    example.to(dtype)
    for weight in example.parts():
        weight.select(None)
        weight.collect_dense_gradient = False
        weight.requires_grad_()
        values, (rows, columns) = weight.values, weight.shape
        # New ones where all are zero, and zero where a frame reaches over the edge.
        inside = weight.entries() < rows * columns
        values.copy_(random(values.shape, dtype, generator) * inside)
    for choice in choices(example).values():
        if choice.soft:
            choice.harden()
    example.index()
    return example
