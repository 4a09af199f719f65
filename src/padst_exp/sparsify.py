"""Swap layers of any `nn.Module` for sparse ones, by name patterns, and say exactly what was done.

report = sparsify(
    model,
    [Rule("blocks.*.attn.qkv", split=3), Rule("blocks.*.mlp.fc?")],
    structure=NM(n=1, m=None, group=16),
    density=0.1,
    learner=RandomPermutation(side="auto"),
)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.dst import Algorithm
from padst_exp.errors import UserError, require
from padst_exp.layers import LowRank, SparseLinear, SparseWeight, layer_densities
from padst_exp.layers.views import LinearView, view
from padst_exp.permutations import NoPermutation, Permutation, PermutationLearner
from padst_exp.pools import TRAITS
from padst_exp.seeds import stream
from padst_exp.structures import (
    Dense,
    Geometry,
    Storage,
    Structure,
    best_units,
    random_units,
)


@dataclass(frozen=True)
class Rule:
    """Layers to make sparse.

    Args:
        pattern: shell-style pattern over module names, e.g. `blocks.*.mlp.fc1`.
        split: how many projections of equal width a layer fuses on its output (3 for QKV); each
            becomes a sparse weight of its own.
    """

    pattern: str
    split: int = 1


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass of one sample.

    Args:
        dense: of the original model.
        fixed: of all that has no sparse weight in the model at hand.
        weights: of each sparse weight by name, were it dense.
    """

    dense: int
    fixed: int
    weights: Mapping[str, float]

    def now(self, densities: Mapping[str, float]) -> float:
        """Of the model at hand, given the density of each sparse weight."""
        return self.fixed + sum(densities[name] * flops for name, flops in self.weights.items())


@dataclass(frozen=True)
class Baseline:
    """What a sparse model is compared with: the model as it was, before any transformation.

    Args:
        parameters: of the whole model.
        macs: weights of the layers that became sparse, without biases: multiply-accumulates per
            token, or per output position of a convolution.
        factors: weights that a transformation keeps dense beside the sparse ones.
        growth: parameters that it added elsewhere, such as wider embeddings and norms.
        flops: before and after it; None: there was none.
    """

    parameters: int
    macs: int
    factors: int = 0
    growth: int = 0
    flops: Flops | None = None


@dataclass(frozen=True)
class LayerReport:
    """One sparse weight as it is now. Counts are of weights, without biases; macs per token.

    `static` says that its algorithm leaves it as it is, `companion` how many parameters its share
    of a low-rank companion has (part of `parameters` and `macs_sparse`).
    """

    name: str
    shape: tuple[int, int]
    density_asked: float
    density: float
    active_units: int
    unit_entries: int
    static: bool
    side: str
    companion: int
    parameters: int
    macs_dense: int
    macs_sparse: int


@dataclass(frozen=True)
class Report:
    """What `sparsify` did, and what has become of it: densities are read when asked.

    Args:
        structure: class name of the structure.
        model_layers: the sparse layers by name.
        asked: the density asked of every sparse weight, by name.
        sides: the side that each layer's permutations act on, by name.
        baseline: the model before.
        algorithm: that changes the topologies; None for none.
    """

    structure: str
    model_layers: Mapping[str, SparseLinear]
    asked: Mapping[str, float]
    sides: Mapping[str, str]
    baseline: Baseline
    algorithm: Algorithm | None = None

    @property
    def layers(self) -> list[LayerReport]:
        """One row for each sparse weight."""
        return [
            self._row(f"{name}.weights.{part}", name, layer, weight)
            for name, layer in self.model_layers.items()
            for part, weight in enumerate(layer.parts())
        ]

    def density(self, scope: Literal["layers", "model"]) -> float:
        """Kept share of the weights of the baseline's sparse layers, or of all its parameters."""
        kept = self.baseline.factors + sum(
            weight.topology().num_entries + _companion_parameters(layer, weight)
            for layer in self.model_layers.values()
            for weight in layer.parts()
        )
        removed, total = self.baseline.macs - kept, self.baseline.macs
        if scope == "model":
            removed, total = removed - self.baseline.growth, self.baseline.parameters
        return 1 - removed / total if total else 1.0

    def flops(self) -> float | None:
        """FLOPs of a forward pass over those of the baseline; None without a transformation."""
        flops = self.baseline.flops
        if flops is None:
            return None
        kept = {layer.name: layer.parameters / layer.macs_dense for layer in self.layers}
        return flops.now(kept) / flops.dense

    def to_dict(self) -> dict[str, object]:
        """Plain data for `summary.json`."""
        return {
            "structure": self.structure,
            "density_of_layers": self.density("layers"),
            "density_of_model": self.density("model"),
            "model_parameters_dense": self.baseline.parameters,
            "flops_over_dense": self.flops(),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def _row(
        self, name: str, layer_name: str, layer: SparseLinear, weight: SparseWeight
    ) -> LayerReport:
        topology, companion = weight.topology(), _companion_parameters(layer, weight)
        entries = topology.num_entries
        return LayerReport(
            name=name,
            shape=weight.shape,
            density_asked=self.asked[name],
            density=topology.density,
            active_units=len(topology.active),
            unit_entries=weight.geometry.unit_size,
            static=self.algorithm is None or not self.algorithm.can_change(topology),
            side=self.sides[layer_name],
            companion=companion,
            parameters=entries + companion,
            macs_dense=topology.size,
            macs_sparse=entries + companion,
        )


def _companion_parameters(layer: SparseLinear, weight: SparseWeight) -> int:
    """The share of one weight in the companion of its layer; its input side is for all weights."""
    if layer.companion is None:
        return 0
    rank = layer.companion.up.shape[1]
    return rank * weight.shape[0] + rank * weight.shape[1] // len(layer.weights)


def sparsify(
    model: nn.Module,
    rules: Sequence[Rule],
    *,
    structure: Structure,
    density: float,
    distribution: Literal["uniform", "erk"] | Mapping[str, float] = "uniform",
    learner: PermutationLearner | None = None,
    algorithm: Algorithm | None = None,
    low_rank: int = 0,
    storage: Storage = "packed",
    topology: Literal["random", "magnitude"] = "random",
    rescale: bool = True,
    seed: int = 0,
    baseline: Baseline | None = None,
) -> Report:
    """Replace every layer that a rule names by a sparse one, in place.

    Args:
        model: any module; layers that `layers.views` knows can be replaced.
        rules: which layers; the first rule that matches a name counts.
        structure: the sparsity structure of all of them; `Dense` leaves the model as it is.
        density: share of the weights of these layers to keep, in (0, 1].
        distribution: `"uniform"`; `"erk"` (Erdos-Renyi-Kernel: density of a layer proportional
            to (O + I) / (O * I), capped at 1, same total; RigL, section 3); or densities for
            patterns, the others keeping `density`.
        learner: creates the permutations; None for none.
        algorithm: says with which density weights start and whether a soft selection weighs their
            units; None: with the density asked, and none does.
        low_rank: rank of a dense companion U V of every layer, paid for by fewer active units.
        storage: `"packed"` or `"masked"`.
        topology: initial active units: random, or the largest of the present weights.
        rescale: multiply each row by sqrt(I / its active inputs), so that outputs keep the
            variance the dense initialisation gave them.
        seed: of topologies and permutations.
        baseline: what the report compares with; None: the model as it comes.

    Returns:
        The report. Each sparse weight's topology depends on the seed and its own position only.

    Raises:
        UserError: a pattern matches nothing, or a tied or unsuitable layer; an impossible density.
    """
    require(low_rank >= 0, "low_rank", low_rank, "a rank of at least 0")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(structure, Dense):
        return Report(type(structure).__name__, {}, {}, {}, baseline or Baseline(parameters, 0))
    require(bool(rules) or density == 1, "sparse", "none", "patterns of layers, or structure=dense")
    chosen = match(model, rules)
    output = output_layer(model)
    shapes = weight_shapes(chosen)
    baseline = baseline or Baseline(parameters, sum(o * i for o, i in shapes.values()))
    densities = layer_densities(shapes, density, distribution)
    learner = NoPermutation() if learner is None else learner
    layers: dict[str, SparseLinear] = {}
    sides: dict[str, str] = {}
    for position, (found, rule) in enumerate(chosen):
        generator = stream(seed, "sparsify", position)
        weights = []
        for part, matrix in enumerate(found.matrix.chunk(rule.split)):
            name = f"{found.name}.weights.{part}"
            try:
                weight = _weight(
                    matrix.contiguous(),
                    structure,
                    densities[name] - _companion_density(found.matrix, low_rank),
                    storage,
                    algorithm,
                    topology,
                    generator,
                    is_output=found.module is output,
                )
            except UserError as error:
                raise UserError(f"{error} (layer {name})") from None
            if rescale:
                _rescale_rows(weight)
            weights.append(weight)
        inputs, outputs, sides[found.name] = _permutations(
            weights, found, structure, learner, generator
        )
        companion = None
        if low_rank:
            companion = LowRank(found.matrix.shape[0], found.matrix.shape[1], low_rank, generator)
        layer = found.build(weights, found.bias_tensor, inputs, outputs, companion)
        if algorithm is not None and algorithm.silences_rows:
            layer.silences_rows = True
            layer.index()
        layer.to(found.matrix.device).train(found.module.training)
        found.replace(model, layer)
        layers[found.name] = layer
    return Report(type(structure).__name__, layers, densities, sides, baseline, algorithm)


def match(model: nn.Module, rules: Sequence[Rule]) -> list[tuple[LinearView, Rule]]:
    """The layers that rules name, in the order of the model.

    Raises:
        UserError: a pattern matches nothing, or a tied or unsuitable layer.
    """
    modules = dict(model.named_modules())
    views = {name: view(module, name) for name, module in modules.items() if name}
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    chosen: dict[str, Rule] = {}
    for rule in rules:
        names = [name for name in views if fnmatchcase(name, rule.pattern)]
        if not names:
            known = [name for name, found in views.items() if found is not None]
            some = ", ".join(known[:6]) + (", ..." if len(known) > 6 else "") if known else "none"
            raise UserError(
                f"sparse: pattern '{rule.pattern}' matches no layer of the model; "
                f"layers that can be sparse are {some}"
            )
        for name in names:
            found = views[name]
            if found is None or not isinstance(getattr(found.module, found.weight), nn.Parameter):
                raise UserError(
                    f"sparse: pattern '{rule.pattern}' matches '{name}', a "
                    f"{type(modules[name]).__name__}; only linear layers and ungrouped 2d "
                    "convolutions can be made sparse"
                )
            if len(owners[id(found.parameter)]) > 1:
                raise UserError(
                    f"sparse: pattern '{rule.pattern}' matches '{name}', whose weight is tied: "
                    f"{' and '.join(owners[id(found.parameter)])}"
                )
            chosen.setdefault(name, rule)
    return [(found, chosen[name]) for name, found in views.items() if name in chosen and found]


def weight_shapes(chosen: Sequence[tuple[LinearView, Rule]]) -> dict[str, tuple[int, int]]:
    """`(O, I)` of every weight that is to be sparse, by its future name.

    Raises:
        UserError: a split does not divide the outputs of a layer.
    """
    return {
        f"{found.name}.weights.{part}": shape
        for found, rule in chosen
        for part, shape in enumerate(_projection_shapes(found, rule))
    }


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer whose outputs are those of the model: its classifier, or its last layer."""
    for name in ("get_classifier", "get_output_embeddings"):
        layer = getattr(model, name)() if callable(getattr(model, name, None)) else None
        if isinstance(layer, nn.Module):
            return layer
    layers = [module for name, module in model.named_modules() if name and view(module, name)]
    return layers[-1] if layers else None


def _projection_shapes(found: LinearView, rule: Rule) -> list[tuple[int, int]]:
    rows, columns = found.matrix.shape
    if rule.split < 1 or rows % rule.split:
        raise UserError(
            f"sparse: pattern '{rule.pattern}' has split={rule.split}, which does not divide the "
            f"{rows} outputs of '{found.name}'"
        )
    return [(rows // rule.split, columns)] * rule.split


def _companion_density(matrix: Tensor, rank: int) -> float:
    return rank * sum(matrix.shape) / matrix.numel()


def _weight(
    matrix: Tensor,
    structure: Structure,
    density: float,
    storage: Storage,
    algorithm: Algorithm | None,
    topology: Literal["random", "magnitude"],
    generator: torch.Generator,
    *,
    is_output: bool,
) -> SparseWeight:
    """One sparse weight with its first topology, and its selection if the algorithm wants one."""
    require(density > 0, "low_rank", "one that takes all entries", "a rank that leaves some")
    geometry = structure.geometry(matrix.shape[0], matrix.shape[1], density)
    if algorithm is not None:
        _check_served(algorithm, structure, geometry)
    target = structure.initial_counts(geometry, density)
    counts = target
    if algorithm is not None and (start := algorithm.initial_density(density)) != density:
        counts = structure.initial_counts(geometry, start)
    active = _first_units(geometry, counts, matrix, topology, generator)
    weight = SparseWeight(geometry, active, matrix, storage, target=target, is_output=is_output)
    if algorithm is not None:
        weight.select(algorithm.selection(weight.topology(), generator))
    return weight


def _check_served(algorithm: Algorithm, structure: Structure, geometry: Geometry) -> None:
    """Refuse an algorithm that makes no sense on units and pools like these."""
    for trait in sorted(algorithm.requires - geometry.traits):
        wanted = f"{TRAITS[trait]} as this dst needs"
        require(False, "structure", type(structure).__name__, wanted)


def _first_units(
    geometry: Geometry,
    counts: Tensor,
    matrix: Tensor,
    topology: Literal["random", "magnitude"],
    generator: torch.Generator,
) -> Tensor:
    if topology == "magnitude":
        return best_units(geometry, counts, geometry.unit_rms(matrix))
    return random_units(geometry, counts, generator)


def _rescale_rows(weight: SparseWeight) -> None:
    entries = weight.entries()
    num_rows, num_columns = weight.shape
    rows = (entries // num_columns).clamp(max=num_rows)
    if weight.selection is None:
        fan_in = torch.bincount(rows.flatten(), minlength=num_rows + 1)
    else:
        # As many inputs as hold the share of a row's square that stays once the selection is hard.
        square = weight.unweighed().double().square()
        left = square * weight.selection.coefficients().detach().double()[:, None]
        whole, left = (
            torch.bincount(rows.flatten(), part.flatten(), num_rows + 1) for part in (square, left)
        )
        fan_in = num_columns * left / whole.clamp_min(torch.finfo(whole.dtype).tiny)
    factor = (num_columns / fan_in.clamp(min=1)).sqrt().to(weight.values.dtype)
    with torch.no_grad():
        if weight.storage == "packed":
            weight.values.mul_(factor[rows])
        else:
            weight.values.mul_(factor[:num_rows, None])


def _permutations(
    weights: list[SparseWeight],
    found: LinearView,
    structure: Structure,
    learner: PermutationLearner,
    generator: torch.Generator,
) -> tuple[Permutation | None, list[Permutation | None], str]:
    """The permutations of the input and of each output, and the side they act on."""
    rows = weights[0].shape[0]
    side: str = learner.side
    if side == "auto":
        # Fused projections share one input-side matrix, the cheapest there is.
        side = "in" if len(weights) > 1 else structure.auto_side(rows, found.features)
    inputs = learner.create(found.features, generator) if side in ("in", "both") else None
    outputs: list[Permutation | None] = [
        learner.create(rows, generator) if side in ("out", "both") else None for _ in weights
    ]
    device = weights[0].values.device
    for permutation in (inputs, *outputs):
        if permutation is not None:
            permutation.to(device)
    has_any = inputs is not None or any(output is not None for output in outputs)
    return inputs, outputs, side if has_any else "none"
