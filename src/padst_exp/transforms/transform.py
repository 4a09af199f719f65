"""What every transform does: rewrite a dense model, then find the sparsity that pays for it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.analysis.cost import Costs, count
from padst_exp.errors import UserError, require
from padst_exp.layers import layer_densities
from padst_exp.layers.views import LinearView
from padst_exp.sparsify import Baseline, Flops, Report, Rule, match, weight_shapes

Distribution = Literal["uniform", "erk"] | Mapping[str, float]

# How far the FLOPs of a transformed model may be from those of the dense one.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Original:
    """The dense model that a transform starts from.

    Args:
        build: makes it, with some of its keys replaced; equally initialised each time.
        keys: of its constructor, those that the data set gives left out.
        rules: which of its layers are to be sparse.
        inputs: one sample, as a batch; only shape and dtype matter.
    """

    build: Callable[[Mapping[str, object]], nn.Module]
    keys: Mapping[str, object]
    rules: Sequence[Rule]
    inputs: Tensor


@dataclass(frozen=True)
class Transformed:
    """A dense model ready for `sparsify`, and what its report compares with.

    Args:
        model: rewritten.
        rules: which of its layers are to be sparse.
        density: of those.
        baseline: the original; None: `model` is the original.
    """

    model: nn.Module
    rules: Sequence[Rule]
    density: float
    baseline: Baseline | None = None


@dataclass
class Rewrite:
    """What a transform made of a model.

    Args:
        model: rewritten.
        rules: which of its layers are to be sparse.
        factors: weights of dense layers that it put beside sparse ones.
    """

    model: nn.Module
    rules: Sequence[Rule]
    factors: int = 0


class Transform(abc.ABC):
    """Makes layers larger by as much as sparsity makes them cheaper (Sparse-IFT, 2024).

    Args:
        scope: "model": the sparsity is solved anew such that a forward pass of the whole model
            takes the FLOPs of the original, whatever stays dense; "layers": it is the one asked
            for, and the model's FLOPs differ.
    """

    def __init__(self, *, scope: Literal["model", "layers"]) -> None:
        self.scope = scope

    def __call__(
        self, original: Original, sparsity: float, distribution: Distribution
    ) -> Transformed:
        """The model that takes the place of `original`.

        Args:
            original: the dense model.
            sparsity: the one knob; sizes follow from it.
            distribution: of the sparsity over the layers, as in `sparsify`.

        Raises:
            UserError: the FLOPs cannot be met, or a layer or a size does not suit the transform.
        """
        keys = original.keys
        fresh = not keys.get("pretrained") and keys.get("checkpoint") is None
        require(fresh, "transform", type(self).__name__, "none with weights that are loaded")
        model = original.build({})
        chosen = match(model, original.rules)
        before = count(model, original.inputs)
        parameters = _parameters(model)
        macs = sum(found.matrix.numel() for found, _ in chosen)
        rewrite = self.rewrite(model, original, chosen, sparsity)

        after = count(rewrite.model, original.inputs)
        shapes = weight_shapes(match(rewrite.model, rewrite.rules))
        sparse = sum(rows * columns for rows, columns in shapes.values())
        flops = _flops(before, after, shapes)
        density = 1 - sparsity
        if self.scope == "model":
            density = _solve(flops, shapes, distribution, sparsity, type(self).__name__)
        rest = _parameters(rewrite.model) - sparse - rewrite.factors
        baseline = Baseline(
            parameters=parameters,
            macs=macs,
            factors=rewrite.factors,
            growth=rest - (parameters - macs),
            flops=flops,
        )
        return Transformed(rewrite.model, rewrite.rules, density, baseline)

    @abc.abstractmethod
    def rewrite(
        self,
        model: nn.Module,
        original: Original,
        chosen: Sequence[tuple[LinearView, Rule]],
        sparsity: float,
    ) -> Rewrite:
        """Rewrite `model` (in place, or build another).

        Args:
            model: the original, built.
            original: what it was built from.
            chosen: its layers that are to be sparse, and by which rule.
            sparsity: as asked.
        """

    def check(self, report: Report) -> None:
        """Refuse what `sparsify` did if the structure's units missed the FLOPs.

        Raises:
            UserError: nothing is sparse, or the FLOPs are more than 1% off.
        """
        name = type(self).__name__
        require(bool(report.model_layers), "transform", name, "none with structure=dense")
        ratio = report.flops()
        if self.scope == "model" and ratio is not None and abs(ratio - 1) > TOLERANCE:
            raise UserError(
                f"transform: expected a structure whose units meet the FLOPs of the dense model "
                f"within {TOLERANCE:.0%}, got {ratio:.4f} of them with {name}; use smaller units, "
                "or transform.scope=layers"
            )


def example(shape: Mapping[str, int]) -> Tensor:
    """A batch of one sample, all zeros: `[1, C, H, W]` for images, int64 `[1, T]` for tokens.

    Args:
        shape: what a data set gives to every model, `Task.model_shape`.
    """
    if "context_length" in shape:
        return torch.zeros(1, shape["context_length"], dtype=torch.int64)
    return torch.zeros(1, shape["channels"], shape["image_size"], shape["image_size"])


class NoTransform:
    """The model stays as it is."""

    def __call__(
        self, original: Original, sparsity: float, distribution: Distribution
    ) -> Transformed:
        """The original itself."""
        return Transformed(original.build({}), original.rules, 1 - sparsity)

    def check(self, report: Report) -> None:
        """There is nothing to check."""


def whole(value: float, key: str, sparsity: float) -> int:
    """`value` as a whole number.

    Raises:
        UserError: it is far from one.
    """
    number = max(1, round(value))
    if abs(value - number) > 0.02 * number:
        lower, upper = (1 - 1 / k for k in (max(1, int(value)), int(value) + 1))
        raise UserError(
            f"sparsity: expected 1 - 1 / {key} for a whole number of {key}, such as {lower:.4g} or "
            f"{upper:.4g}, got {sparsity:g}"
        )
    return number


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _flops(before: Costs, after: Costs, shapes: Mapping[str, tuple[int, int]]) -> Flops:
    products = after.products()
    rows: dict[str, int] = {}
    for name, (height, _) in shapes.items():
        layer = _layer(name)
        rows[layer] = rows.get(layer, 0) + height
    weights = {
        name: products[_layer(name)] * height / rows[_layer(name)]
        for name, (height, _) in shapes.items()
    }
    return Flops(
        dense=before.flops, fixed=round(after.flops - sum(weights.values())), weights=weights
    )


def _layer(weight: str) -> str:
    return weight.rpartition(".weights.")[0]


def _solve(
    flops: Flops,
    shapes: Mapping[str, tuple[int, int]],
    distribution: Distribution,
    sparsity: float,
    name: str,
) -> float:
    """The density at which the model at hand takes the FLOPs of the original, by bisection."""

    def now(density: float) -> float:
        return flops.now(layer_densities(shapes, density, distribution))

    low, high = 1e-6, 1.0
    if now(low) > flops.dense:
        raise UserError(
            f"sparsity: expected less with {name}, for what stays dense in the model alone takes "
            f"{now(low) / flops.dense:.3f} of the original's FLOPs (or transform.scope=layers), "
            f"got {sparsity:g}"
        )
    if now(high) <= flops.dense:
        return high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if now(middle) < flops.dense else (low, middle)
    return high
