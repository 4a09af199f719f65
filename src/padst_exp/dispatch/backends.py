"""Measured, forced or remembered: the backend of every sparse product of a model in training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from padst_exp.dispatch.agreement import agrees
from padst_exp.dispatch.decision import Decision, device_name, fastest
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear
from padst_exp.permutations import Permutation
from padst_exp.structures import Backend, Product

# Ratios no longer change with more tokens, but measuring takes longer.
MAX_TOKENS = {"cpu": 1024, "cuda": 1 << 16}


# Whether inputs and outputs are permuted.
Permuted = tuple[bool, bool]


@dataclass(frozen=True)
class Choice:
    """How one product is computed.

    Args:
        backend: see `structures.Product`.
        tokens: that were measured with, about those of a forward pass; 0 where nothing was.
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
        if not {"reference", self.backend} <= self.seconds.keys():
            return None
        return self.seconds["reference"] / self.seconds[self.backend]


def choose(
    model: nn.Module,
    example: Callable[[], object],
    *,
    samples: int,
    device: torch.device,
    compiled: bool,
    allowed: Collection[Backend] = get_args(Backend),
) -> dict[str, Choice]:
    """Measure every kind of sparse product of `model` and let each use its fastest backend.

    Forward and backward together. A kernel that disagrees with plain PyTorch is not chosen.

    Args:
        model: on `device`; only its backends change.
        example: runs `model` on one sample, as training will.
        samples: in one forward pass of training.
        device: of the model.
        compiled: whether `torch.compile` will compile it; part of what decisions are kept under.
        allowed: backends that may run.

    Raises:
        ValueError: a product has none of the `allowed` backends.

    Returns:
        The choice for each product by its module name.
    """
    seen = _inputs(model, example)
    choices: dict[str, Choice] = {}
    for name, layer in _layers(model).items():
        tokens, dtype = seen.get(name, (0, torch.float32))
        # Soft permutations act outside of the product, but only for a small part of training.
        outputs = any(isinstance(m, Permutation) for m in layer.output_permutations)
        permuted = layer.input_permutation is not None, outputs
        for part, product in enumerate(layer.parts()):
            choices[f"{name}.products.{part}"] = _measured(
                product, tokens * samples, dtype, device, compiled, permuted, allowed
            )
    reuse(model, choices)
    return choices


def forced(model: nn.Module, backend: Backend, device: torch.device) -> dict[str, Choice]:
    """Use `backend` wherever a product has it, what it has where not. Measures nothing.

    Raises:
        UserError: see `require_device`.
    """
    require_device(backend, device)
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


def require_device(backend: str, device: torch.device) -> None:
    """Raise a UserError where `backend` is "triton" or "cuda" and `device` is no GPU."""
    if backend in ("triton", "cuda") and device.type != "cuda":
        raise UserError(
            f"backend: {backend} needs a GPU, this is {device.type}; use auto, torch or dense"
        )


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


def restore(saved: object, model: nn.Module, device: torch.device) -> dict[str, Choice] | None:
    """The choices that `save` stored.

    Returns:
        By module name; None when they were made on a device of another model, or are not those of
        the products of `model` on `device`.
    """
    if not isinstance(saved, Mapping) or saved.get("device") != device_name(device):
        return None
    try:
        choices = {name: Choice(**choice) for name, choice in saved["choices"].items()}
    except (AttributeError, KeyError, TypeError):
        return None
    possible = {
        f"{name}.products.{part}": product.backends(device)
        for name, layer in _layers(model).items()
        for part, product in enumerate(layer.parts())
    }
    fits = choices.keys() == possible.keys() and all(
        choice.backend in possible[name] for name, choice in choices.items()
    )
    return choices if fits else None


def _layers(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def _inputs(model: nn.Module, example: Callable[[], object]) -> dict[str, tuple[int, torch.dtype]]:
    """Tokens of one sample and dtype at every sparse layer that `example` reaches."""
    seen: dict[str, tuple[int, torch.dtype]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
            (x,) = (*inputs, *named.values())
            cast = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
            seen[name] = (x.numel() // x.shape[-1], dtype)

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, layer in _layers(model).items()
    ]
    try:
        example()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _measured(
    product: Product,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
    permuted: Permuted,
    allowed: Collection[Backend],
) -> Choice:
    possible = [backend for backend in product.backends(device) if backend in allowed]
    if not possible:
        raise ValueError(f"no backend is left of {product.backends(device)}")
    if product.storage == "masked" or tokens == 0:
        return Choice(possible[0], 0, "", {})
    name = str(dtype).removeprefix("torch.")
    decision = training_decision(
        product.layouts, possible, tokens, dtype, device, compiled, permuted
    )
    measured = bucket(tokens, device)
    return Choice(decision.choice, measured, name, decision.seconds)  # type: ignore[arg-type]


def bucket(tokens: int, device: torch.device) -> int:
    """Tokens that a decision for `tokens` is measured with."""
    return min(1 << (tokens - 1).bit_length(), MAX_TOKENS[device.type])


def training_decision(
    layouts: Sequence[Any],
    backends: Sequence[Backend],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
    permuted: Permuted = (False, False),
) -> Decision:
    """The fastest of `backends` for forward and backward of one product.

    Args:
        layouts: of its weights.
        backends: the usual one first; others must agree with it.
        tokens: rows of x; decisions are shared by a `bucket` of them.
        dtype: of activations and values.
        device: where to measure.
        compiled: part of what the decision is kept under. Measured eagerly all the same: compiled
            code calls these very kernels.
        permuted: which sides have a hard permutation folded in.
    """
    what = {
        "weights": [
            (type(layout).__name__, *layout.shape, *layout.frame, layout.num_active)
            for layout in layouts
        ],
        "backends": list(backends),
        "tokens": bucket(tokens, device),
        "dtype": str(dtype),
        "compiled": compiled,
        "permuted": permuted,
        "pass": "forward and backward",
    }
    return fastest(
        what,
        lambda: _passes(layouts, backends, bucket(tokens, device), dtype, device, permuted),
        device=device,
    )


def _passes(
    layouts: Sequence[Any],
    backends: Sequence[Backend],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    permuted: Permuted,
) -> dict[str, Callable[[], Sequence[Tensor]]]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        # Drawn in float32: not every device draws every dtype.
        x = torch.randn(*shape, generator=generator, device=device)
        return x.to(dtype).requires_grad_()

    def permutation(size: int, wanted: bool) -> Tensor | None:
        return torch.randperm(size, generator=generator, device=device) if wanted else None

    on_cpu = torch.Generator().manual_seed(0)
    units = [layout.random_units(on_cpu).to(device) for layout in layouts]
    values = [random(layout.num_active, layout.unit_size) for layout in layouts]
    rows, columns = sum(layout.shape[0] for layout in layouts), layouts[0].shape[1]
    x, weight, dy = random(tokens, columns), random(rows, columns), random(tokens, rows).detach()
    inputs = permutation(columns, permuted[0])
    outputs = [permutation(layout.shape[0], permuted[1]) for layout in layouts]

    def sparse(backend: Backend) -> Callable[[], Sequence[Tensor]]:
        product = Product(layouts, "packed", backend)
        product.fold(units, inputs, outputs)

        def call() -> Sequence[Tensor]:
            y = product(x, values)
            return (y.detach(), *torch.autograd.grad(y, (x, *values), dy))

        return call

    def dense() -> Sequence[Tensor]:
        return torch.autograd.grad(nn.functional.linear(x, weight), (x, weight), dy)

    usual, *others = (sparse(backend) for backend in backends)
    passes: dict[str, Callable[[], Sequence[Tensor]]] = {backends[0]: usual}
    expected = usual()
    for backend, call in zip(backends[1:], others, strict=True):
        if agrees(backend, call, expected):
            passes[backend] = call
    return {**passes, "reference": dense}
