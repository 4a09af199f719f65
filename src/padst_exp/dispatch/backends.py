"""Measured, forced or remembered: the backend of every sparse product of a model in training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from padst_exp.dispatch.decision import Decision, device_name, fastest
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear
from padst_exp.structures import Backend, Product

# Ratios no longer change with more tokens, but measuring takes longer.
MAX_TOKENS = {"cpu": 1024, "cuda": 1 << 16}

# Largest relative error at which a kernel may replace plain PyTorch.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Choice:
    """How one product is computed.

    Args:
        backend: see `structures.Product`.
        tokens: of one forward pass; 0 where nothing was measured.
        dtype: of activations, e.g. "bfloat16".
        seconds: of forward and backward by each backend, and of a dense layer ("reference").
    """

    backend: Backend
    tokens: int
    dtype: str
    seconds: dict[str, float]

    @property
    def speedup(self) -> float | None:
        """Time of a dense layer over the time of this one, as measured; None if never."""
        if not self.seconds:
            return None
        return self.seconds["reference"] / self.seconds[self.backend]


def choose(
    model: nn.Module,
    example: Callable[[], object],
    *,
    samples: int,
    device: torch.device,
    compiled: bool,
) -> dict[str, Choice]:
    """Measure every kind of sparse product of `model` and let each use its fastest backend.

    Forward and backward together. A kernel that disagrees with plain PyTorch is not chosen.

    Args:
        model: on `device`; only its backends change.
        example: runs `model` on one sample, as training will.
        samples: in one forward pass of training.
        device: of the model.
        compiled: whether `torch.compile` will compile it; part of what decisions are kept under.

    Returns:
        The choice for each product by its module name.
    """
    seen = _inputs(model, example)
    choices: dict[str, Choice] = {}
    for name, layer in _layers(model).items():
        tokens, dtype = seen.get(name, (0, torch.float32))
        for part, product in enumerate(layer.parts()):
            choices[f"{name}.products.{part}"] = _measured(
                product, tokens * samples, dtype, device, compiled
            )
    reuse(model, choices)
    return choices


def forced(model: nn.Module, backend: Backend, device: torch.device) -> dict[str, Choice]:
    """Use `backend` wherever a product has it, what it has where not. Measures nothing.

    Raises:
        UserError: "triton" or "cuda" without a GPU.
    """
    if backend in ("triton", "cuda") and device.type != "cuda":
        raise UserError(
            f"backend: {backend} needs a GPU, this is {device.type}; use auto, torch or dense"
        )
    choices = {}
    for name, layer in _layers(model).items():
        for part, product in enumerate(layer.parts()):
            possible = product.backends(device)
            # What only some products have in CUDA, the others have in Triton.
            wanted = (backend, "triton") if backend == "cuda" else (backend,)
            taken = next((name for name in wanted if name in possible), possible[0])
            choices[f"{name}.products.{part}"] = Choice(taken, 0, "", {})
    reuse(model, choices)
    return choices


def reuse(model: nn.Module, choices: Mapping[str, Choice]) -> None:
    """Let the products of `model` use `choices`, by their module names."""
    for name, layer in _layers(model).items():
        layer.use_backends(
            [choices[f"{name}.products.{part}"].backend for part in range(len(layer.products))]
        )


def save(choices: Mapping[str, Choice], device: torch.device) -> dict[str, Any]:
    """Plain data for a checkpoint."""
    return {
        "device": device_name(device),
        "choices": {name: asdict(choice) for name, choice in choices.items()},
    }


def restore(saved: Mapping[str, Any], device: torch.device) -> dict[str, Choice] | None:
    """The choices that `save` stored; None when they were made on another device."""
    if saved["device"] != device_name(device):
        return None
    return {name: Choice(**choice) for name, choice in saved["choices"].items()}


def _layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def _inputs(model: nn.Module, example: Callable[[], object]) -> dict[str, tuple[int, torch.dtype]]:
    """Tokens of one sample and dtype at every sparse layer that `example` reaches."""
    seen: dict[str, tuple[int, torch.dtype]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            cast = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
            seen[name] = (x.numel() // x.shape[-1], dtype)

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(name)) for name, layer in _layers(model).items()
    ]
    try:
        example()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _measured(
    product: Product, tokens: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> Choice:
    possible = product.backends(device)
    if product.storage == "masked" or tokens == 0:
        return Choice(possible[0], 0, "", {})
    tokens = min(tokens, MAX_TOKENS[device.type])
    name = str(dtype).removeprefix("torch.")
    decision = training_decision(product.layouts, possible, tokens, dtype, device, compiled)
    return Choice(decision.choice, tokens, name, decision.seconds)  # type: ignore[arg-type]


def training_decision(
    layouts: Sequence[Any],
    backends: Sequence[Backend],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
) -> Decision:
    """The fastest of `backends` for forward and backward of one product.

    Args:
        layouts: of its weights.
        backends: the usual one first; others must agree with it.
        tokens: rows of x.
        dtype: of activations and values.
        device: where to measure.
        compiled: part of what the decision is kept under.
    """
    what = {
        "weights": [
            (type(layout).__name__, *layout.shape, *layout.frame, layout.num_active)
            for layout in layouts
        ],
        "tokens": 1 << (tokens - 1).bit_length(),
        "dtype": str(dtype),
        "compiled": compiled,
        "pass": "forward and backward",
    }
    return fastest(
        what,
        lambda: _passes(layouts, backends, tokens, dtype, device),
        device=device,
    )


def _passes(
    layouts: Sequence[Any],
    backends: Sequence[Backend],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Callable[[], Sequence[Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    units = [layout.random_units(generator).to(device) for layout in layouts]
    values = [random(layout.num_active, layout.unit_size) for layout in layouts]
    rows, columns = sum(layout.shape[0] for layout in layouts), layouts[0].shape[1]
    x, weight, dy = random(tokens, columns), random(rows, columns), random(tokens, rows).detach()

    def sparse(backend: Backend) -> Callable[[], Sequence[Tensor]]:
        product = Product(layouts, "packed", backend)
        product.fold(units, None, [None] * len(layouts))

        def call() -> Sequence[Tensor]:
            y = product(x, values)
            return (y.detach(), *torch.autograd.grad(y, (x, *values), dy))

        return call

    def dense() -> Sequence[Tensor]:
        return torch.autograd.grad(nn.functional.linear(x, weight), (x, weight), dy)

    usual, *others = (sparse(backend) for backend in backends)
    passes: dict[str, Callable[[], Sequence[Tensor]]] = {backends[0]: usual}
    for backend, call in zip(backends[1:], others, strict=True):
        if _agrees(call, usual, backend):
            passes[backend] = call
    return {**passes, "reference": dense}


def _agrees(
    call: Callable[[], Sequence[Tensor]], usual: Callable[[], Sequence[Tensor]], name: str
) -> bool:
    """Whether a backend computes what the usual one does. Says so when it does not."""
    try:
        pairs = list(zip(call(), usual(), strict=True))
        errors = [float((a - b).float().norm() / b.float().norm()) for a, b in pairs]
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
    else:
        if max(errors) <= TOLERANCE[pairs[0][0].dtype]:
            return True
        reason = f"its results differ by {max(errors):.2g}"
    logging.getLogger(__name__).warning("backend %s is not used here: %s", name, reason)
    return False
