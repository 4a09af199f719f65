"""Measured, forced or remembered: the backend of every sparse layer of a model in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from padst_exp.dispatch.agreement import agrees
from padst_exp.dispatch.decision import Decision, device_name, fastest
from padst_exp.errors import UserError, require
from padst_exp.layers import SparseConv2d, SparseLinear, sparse_layers
from padst_exp.soft import choices as soft_or_hard
from padst_kernels import Backend

# Ratios no longer change with more tokens, but measuring takes longer.
MAX_TOKENS = {"cpu": 1024, "cuda": 1 << 16}


@dataclass(frozen=True)
class Choice:
    """How one layer is computed.

    Args:
        backend: see `SparseLinear`.
        tokens: that were measured with, about those of a forward pass; 0 where nothing was.
        dtype: of activations, e.g. "bfloat16".
        seconds: of forward and backward by each backend, and of a dense layer ("dense").
    """

    backend: Backend
    tokens: int
    dtype: str
    seconds: dict[str, float]

    @property
    def speedup(self) -> float | None:
        """Time of a dense layer over the time of this one, as measured; None if never."""
        if not {"dense", self.backend} <= self.seconds.keys():
            return None
        return self.seconds["dense"] / self.seconds[self.backend]


@dataclass(frozen=True)
class _Input:
    """What reaches a layer: the shape behind the batch dimension, tokens of a sample, dtype."""

    shape: tuple[int, ...]
    tokens: int
    dtype: torch.dtype


def choose(
    model: nn.Module,
    example: Callable[[], object],
    *,
    samples: int,
    device: torch.device,
    compiled: bool,
    allowed: Collection[Backend] = get_args(Backend),
) -> dict[str, Choice]:
    """Measure every kind of sparse layer of `model` and let each use its fastest backend.

    Forward and backward together. A kernel that disagrees with a dense weight in plain PyTorch is
    not chosen, whichever it is.

    Args:
        model: on `device`; only its backends change.
        example: runs `model` on one sample, as training will.
        samples: in one forward pass of training.
        device: of the model.
        compiled: whether `torch.compile` will compile it; part of what decisions are kept under.
        allowed: backends that may run.

    Raises:
        ValueError: a layer has none of the `allowed` backends.
    """
    use_usual(model, device, allowed)
    inputs = _inputs(model, example)
    chosen = {
        name: _measured(layer, inputs.get(name), samples, device, compiled, allowed)
        for name, layer in sparse_layers(model).items()
    }
    reuse(model, chosen)
    return chosen


def forced(model: nn.Module, backend: Backend, device: torch.device) -> dict[str, Choice]:
    """Use `backend` wherever a layer has it, what it usually has where not. Measures nothing.

    Raises:
        UserError: see `require_device`.
    """
    require_device(backend, device)
    chosen = {}
    for name, layer in sparse_layers(model).items():
        possible = layer.backends(device)
        # What only some layers have in CUDA, the others have in Triton.
        wanted = (backend, "triton") if backend == "cuda" else (backend,)
        taken = next((name for name in wanted if name in possible), possible[0])
        chosen[name] = Choice(taken, 0, "", {})
    reuse(model, chosen)
    return chosen


def use_usual(
    model: nn.Module, device: torch.device, allowed: Collection[Backend] = get_args(Backend)
) -> None:
    """Let every layer use its usual backend on `device`.

    Raises:
        ValueError: a layer has none of the `allowed` ones.
    """
    for layer in sparse_layers(model).values():
        layer.use_backend(_possible(layer, device, allowed)[0])


def require_device(backend: str, device: torch.device) -> None:
    """Raise a UserError where `backend` runs on another kind of device only."""
    on = {"triton": "cuda", "cuda": "cuda", "native": "cpu"}.get(backend, device.type)
    what = "one for this device, a " + ("GPU" if device.type == "cuda" else "CPU")
    require(on == device.type, "backend", backend, f"{what} (auto, torch or scatter)")


def reuse(model: nn.Module, chosen: Mapping[str, Choice]) -> None:
    """Let the layers of `model` use what was `chosen`, by their module names."""
    for name, layer in sparse_layers(model).items():
        layer.use_backend(chosen[name].backend)


def save(chosen: Mapping[str, Choice], device: torch.device) -> dict[str, Any]:
    """Plain data for a checkpoint."""
    return {
        "device": device_name(device),
        "choices": {name: asdict(choice) for name, choice in chosen.items()},
    }


def restore(saved: object, model: nn.Module, device: torch.device) -> dict[str, Choice] | None:
    """The choices that `save` stored.

    Returns:
        By module name; None when they were made on a device of another model, or are not those of
        the layers of `model` on `device`.
    """
    if not isinstance(saved, Mapping) or saved.get("device") != device_name(device):
        return None
    try:
        chosen = {name: Choice(**choice) for name, choice in saved["choices"].items()}
    except (AttributeError, KeyError, TypeError):
        return None
    possible = {name: layer.backends(device) for name, layer in sparse_layers(model).items()}
    fits = chosen.keys() == possible.keys() and all(
        choice.backend in possible[name] for name, choice in chosen.items()
    )
    return chosen if fits else None


def _inputs(model: nn.Module, example: Callable[[], object]) -> dict[str, _Input]:
    """What of one sample reaches every sparse layer that `example` calls."""
    seen: dict[str, _Input] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(
            layer: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor], y: Tensor
        ) -> None:
            (x,) = (*inputs, *named.values())
            cast = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
            features = layer.out_features
            assert isinstance(features, int)
            seen[name] = _Input(tuple(x.shape[1:]), y.numel() // features, dtype)

        return hook

    handles = [
        layer.register_forward_hook(watch(name), with_kwargs=True)
        for name, layer in sparse_layers(model).items()
    ]
    try:
        example()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _possible(
    layer: SparseLinear, device: torch.device, allowed: Collection[Backend]
) -> list[Backend]:
    possible = [backend for backend in layer.backends(device) if backend in allowed]
    if not possible:
        raise ValueError(f"no backend is left of {layer.backends(device)}")
    return possible


def _measured(
    layer: SparseLinear,
    found: _Input | None,
    samples: int,
    device: torch.device,
    compiled: bool,
    allowed: Collection[Backend],
) -> Choice:
    possible = _possible(layer, device, allowed)
    if layer.storage == "masked" or found is None or found.tokens == 0:
        return Choice(possible[0], 0, "", {})
    shape, tokens = measured_shape(layer, found.shape, found.tokens, samples, device)
    decision = training_decision(layer, possible, shape, found.dtype, device, compiled)
    name = str(found.dtype).removeprefix("torch.")
    return Choice(cast(Backend, decision.choice), tokens, name, decision.seconds)


def measured_shape(
    layer: SparseLinear,
    sample: tuple[int, ...],
    tokens: int,
    samples: int,
    device: torch.device,
) -> tuple[tuple[int, ...], int]:
    """The shape of the input a decision is measured with, and its tokens: a power of two of them.

    Args:
        layer: to be measured.
        sample: shape of its input without the batch dimension.
        tokens: rows that one sample multiplies: output positions of a convolution.
        samples: in one forward pass.
        device: of the layer.
    """
    most = MAX_TOKENS[device.type]
    if isinstance(layer, SparseConv2d):
        number = min(1 << (samples - 1).bit_length(), max(1, most // tokens))
        return (number, *sample), number * tokens
    number = min(1 << (tokens * samples - 1).bit_length(), most)
    return (number, layer.in_features), number


def training_decision(
    layer: SparseLinear,
    backends: Sequence[Backend],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
) -> Decision:
    """The fastest of `backends` for forward and backward of layers like `layer`.

    Args:
        layer: any of its kind; a copy of it is measured.
        backends: the candidates.
        shape: of the input.
        dtype: of activations and values.
        device: where to measure.
        compiled: part of what the decision is kept under. Measured eagerly all the same: compiled
            code calls these very kernels.
    """
    what = {
        "layer": type(layer).__name__,
        "weights": [
            (type(w.geometry).__name__, *w.shape, *w.geometry.frame, len(w.active))
            for w in layer.parts()
        ],
        "backends": list(backends),
        "input": shape,
        "dtype": str(dtype),
        "compiled": compiled,
        "permuted": sorted({side for side, _ in layer.permutations()}),
        "pass": "forward and backward",
    }
    return fastest(what, lambda: _passes(layer, backends, shape, dtype, device), device=device)


def _passes(
    layer: SparseLinear,
    backends: Sequence[Backend],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Callable[[], Sequence[Tensor]]]:
    generator = torch.Generator(device).manual_seed(0)
    layer = _example_of(layer, dtype, generator)
    # Drawn in float32: not every device draws every dtype.
    x = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
    values = [weight.values for weight in layer.parts()]
    y = layer.dense_forward(x, layer.weight)
    dy = torch.randn(y.shape, generator=generator, device=device).to(dtype)
    truth = (y.detach(), *torch.autograd.grad(y, (x, *values), dy))

    def sparse(backend: Backend) -> Callable[[], Sequence[Tensor]]:
        own = copy.deepcopy(layer)
        own.use_backend(backend)
        own_values = [weight.values for weight in own.parts()]

        def call() -> Sequence[Tensor]:
            y = own(x)
            return (y.detach(), *torch.autograd.grad(y, (x, *own_values), dy))

        return call

    weight = layer.weight.detach().clone().requires_grad_()

    def dense() -> Sequence[Tensor]:
        return torch.autograd.grad(layer.dense_forward(x, weight), (x, weight), dy)

    passes: dict[str, Callable[[], Sequence[Tensor]]] = {}
    for backend in backends:
        call = sparse(backend)
        if agrees(backend, call, truth):
            passes[backend] = call
    if not passes:
        raise UserError(
            f"backend: none of {', '.join(backends)} computes what a dense weight does, "
            "expected at least plain PyTorch; this is a fault of the installation"
        )
    return {**passes, "dense": dense}


def _example_of(
    layer: SparseLinear, dtype: torch.dtype, generator: torch.Generator
) -> SparseLinear:
    """A copy of `layer` with random values and permutations that are hard already."""
    example = copy.deepcopy(layer)
    example.bias, example.companion = None, None
    example.to(dtype)
    for weight in example.parts():
        weight.select(None)
        weight.collect_dense_gradient = False
        weight.requires_grad_()
        with torch.no_grad():
            noise = torch.randn(
                weight.values.shape, generator=generator, device=weight.values.device
            )
            # What lies outside the weight, or under no mask, stays zero.
            weight.values.copy_(noise * (weight.values != 0))
    for choice in soft_or_hard(example).values():
        if choice.soft:
            choice.harden()
    example.index()
    return example
