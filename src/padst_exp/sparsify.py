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
from typing import Literal, get_args

from torch import nn
from torch.nn.parameter import is_lazy

from padst_exp.dst import Algorithm
from padst_exp.errors import UserError, require
from padst_exp.layers import SparseLinear, SparseWeight, layer_densities
from padst_exp.layers.surgery import Scoring, Surgery, Taken
from padst_exp.layers.views import LinearView, view
from padst_exp.permutations import NoPermutation, PermutationLearner
from padst_exp.seeds import stream
from padst_exp.structures import Dense, Storage, Structure


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

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} sparse weights keep {self.density('layers'):.2%} of their "
            f"entries, {self.density('model'):.2%} of the model's parameters remain"
        )

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
            static=weight.frozen
            or self.algorithm is None
            or not self.algorithm.can_change(topology),
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
    topology: Scoring = "random",
    rescale: bool = True,
    seed: int = 0,
    baseline: Baseline | None = None,
    taken: Taken | None = None,
) -> Report:
    """Replace every layer that a rule names by a sparse one, in place.

    A layer that several modules share stays shared. What is frozen (`requires_grad=False`) stays
    so: a frozen weight has its final density, hard permutations and no companion from the start,
    and no algorithm changes its units. Hooks of forward and backward passes stay.

    Args:
        model: any module; layers that `layers.views` knows can be replaced.
        rules: which layers; the first rule that matches a name counts.
        structure: the sparsity structure of all of them; `Dense` leaves the model as it is.
        density: share of the weights of these layers to keep, in (0, 1].
        distribution: `"uniform"`; `"erk"` (Erdos-Renyi-Kernel: density of a layer proportional
            to (O + I) / (O * I), capped at 1, same total; RigL, section 3); or sparsities for
            patterns, the others keeping `density`.
        learner: creates the permutations; None for none.
        algorithm: says with which density weights start and whether a soft selection weighs their
            units; None: with the density asked, and none does.
        low_rank: rank of a dense companion U V of every layer, paid for by fewer active units.
        storage: `"packed"` or `"masked"`.
        topology: initial active units: random; the largest of the present weights; or those of
            the largest importance, given for each layer by name as its matrix is, `[O, I]`.
        rescale: the weights are fresh: multiply each row by sqrt(I / its active inputs), so that
            outputs keep the variance the dense initialisation gave them. False: they are worth
            keeping. S is then read from P_out^-1 W P_in^-1 and its units are chosen there, so
            that the layer computes what the dense one did as far as its units allow.
        seed: of topologies and permutations.
        baseline: what the report compares with; None: the model as it comes.
        taken: units and permutations of other layers of the same names and shapes, which then
            are neither drawn nor chosen.

    Returns:
        The report. Each sparse weight's topology depends on the seed and its own position only.

    Raises:
        UserError: a pattern matches nothing, or a tied or unsuitable layer; an impossible
            density. The model is then as it was.
    """
    require(0 < density <= 1, "density", density, "a share to keep, in (0, 1]")
    require(low_rank >= 0, "low_rank", low_rank, "a rank of at least 0")
    require(storage in get_args(Storage), "storage", storage, "packed or masked")
    parameters = _count(model)
    if isinstance(structure, Dense):
        return Report(type(structure).__name__, {}, {}, {}, baseline or Baseline(parameters, 0))
    require(bool(rules) or density == 1, "sparse", "none", "patterns of layers, or structure=dense")
    chosen = match(model, rules)
    for found, _ in chosen:
        if found.parameter.is_meta:
            where = f"'{found.name}' on the meta device, without values"
            raise UserError(f"sparse: expected layers with weights, got {where}")
    shapes = weight_shapes(chosen)
    baseline = baseline or Baseline(parameters, sum(o * i for o, i in shapes.values()))
    densities = layer_densities(shapes, density, distribution)
    surgery = Surgery(
        structure=structure,
        densities=densities,
        learner=NoPermutation() if learner is None else learner,
        algorithm=algorithm,
        low_rank=low_rank,
        storage=storage,
        topology=topology,
        fresh=rescale,
        taken=taken or Taken(),
    )
    output = output_layer(model)
    layers: dict[str, SparseLinear] = {}
    sides: dict[str, str] = {}
    for position, (found, rule) in enumerate(chosen):
        layers[found.name], sides[found.name] = surgery(
            found,
            rule.split,
            stream(seed, "sparsify", position),
            is_output=found.module is output,
        )
    # Whatever cannot be done was refused by now.
    for found, _ in chosen:
        found.replace(model, layers[found.name])
    return Report(type(structure).__name__, layers, densities, sides, baseline, algorithm)


def _count(model: nn.Module) -> int:
    """Parameters of the whole model."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            seen = "a model that has seen a batch, so that all its parameters have shapes"
            raise UserError(f"sparse: expected {seen}, got '{name}' without one")
    return sum(parameter.numel() for parameter in model.parameters())


def match(model: nn.Module, rules: Sequence[Rule]) -> list[tuple[LinearView, Rule]]:
    """The layers that rules name, in the order of the model; each once, under its first name.

    Raises:
        UserError: a pattern matches nothing, or a tied or unsuitable layer.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    views = {module: view(module, known[0]) for module, known in names.items()}
    for module, found in views.items():
        if found is not None and found.name != names[module][0]:
            inside = found.name.removeprefix(names[module][0])  # a projection goes by its own name
            names[module] += [f"{name}{inside}" for name in names[module]]
    owners = _owners(names)
    chosen: dict[nn.Module, Rule] = {}
    for rule in rules:
        matched = {
            module: name
            for module, known in names.items()
            for name in reversed(known)
            if name and fnmatchcase(name, rule.pattern)
        }
        if not matched:
            raise UserError(f"sparse: pattern '{rule.pattern}' matches no {_known(model, views)}")
        for module, name in matched.items():
            where, found = f"sparse: pattern '{rule.pattern}' matches '{name}', ", views[module]
            if found is None:
                raise UserError(
                    f"{where}a {type(module).__name__}; only linear layers, projections of "
                    "attention and ungrouped 2d convolutions can be made sparse, here "
                    f"{_some(model, views)}"
                )
            if (obstacle := found.obstacle()) is not None:
                raise UserError(f"{where}{obstacle}; make it a plain layer first")
            if len(tied := owners[_memory(found.parameter)]) > 1:
                raise UserError(f"{where}whose weight is tied: {' and '.join(tied)}")
            chosen.setdefault(module, rule)
    return [(found, chosen[m]) for m, found in views.items() if m in chosen and found]


def _known(model: nn.Module, views: Mapping[nn.Module, LinearView | None]) -> str:
    """What could have been matched, in words that follow "no"."""
    some = _some(model, views)
    if some == "none" and view(model, "") is not None:
        kind = type(model).__name__
        return f"layer: the model itself is the {kind}, and cannot be replaced inside itself"
    return f"layer of the model; layers that can be sparse are {some}"


def _some(model: nn.Module, views: Mapping[nn.Module, LinearView | None]) -> str:
    """The first layers that can be sparse."""
    known = [found.name for module, found in views.items() if found and module is not model]
    return ", ".join(known[:6]) + (", ..." if len(known) > 6 else "") if known else "none"


def _owners(names: Mapping[nn.Module, list[str]]) -> dict[int, list[str]]:
    """Who holds each parameter, also as a view of the same memory (a transposed one)."""
    owners: dict[int, list[str]] = {}
    for module, known in names.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), []).append(f"{known[0]}.{key}")
    return owners


def _memory(parameter: nn.Parameter) -> int:
    """Where its values are; itself where it has none."""
    return id(parameter) if is_lazy(parameter) else parameter.data_ptr() or id(parameter)


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
