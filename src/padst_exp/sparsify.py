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

from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear, SparseWeight, layer_densities
from padst_exp.permutations import Learner, NoPermutation, Permutation
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
class LayerReport:
    """One sparse weight. Counts are of weights, without biases; macs are per token."""

    name: str
    shape: tuple[int, int]
    density_asked: float
    density: float
    active_units: int
    unit_entries: int
    static: bool
    side: str
    parameters: int
    macs_dense: int
    macs_sparse: int


@dataclass(frozen=True)
class Report:
    """What `sparsify` did.

    Args:
        structure: class name of the structure.
        layers: one row for each sparse weight.
        model_parameters: all parameters the model had while dense.
    """

    structure: str
    layers: list[LayerReport]
    model_parameters: int

    def density(self, scope: Literal["layers", "model"]) -> float:
        """Kept share of the weights of the sparse layers, or of all parameters of the model."""
        dense = sum(layer.macs_dense for layer in self.layers)
        removed = dense - sum(layer.parameters for layer in self.layers)
        total = dense if scope == "layers" else self.model_parameters
        return 1 - removed / total if total else 1.0

    def to_dict(self) -> dict[str, object]:
        """Plain data for `summary.json`."""
        return {
            "structure": self.structure,
            "density_of_layers": self.density("layers"),
            "density_of_model": self.density("model"),
            "model_parameters_dense": self.model_parameters,
            "layers": [asdict(layer) for layer in self.layers],
        }


def sparsify(
    model: nn.Module,
    rules: Sequence[Rule],
    *,
    structure: Structure,
    density: float,
    distribution: Literal["uniform", "erk"] | Mapping[str, float] = "uniform",
    learner: Learner | None = None,
    storage: Storage = "packed",
    topology: Literal["random", "magnitude"] = "random",
    rescale: bool = True,
    seed: int = 0,
) -> Report:
    """Replace every layer that a rule names by a `SparseLinear`, in place.

    Args:
        model: any module; `nn.Linear` and transformers' `Conv1D` layers can be replaced.
        rules: which layers; the first rule that matches a name counts.
        structure: the sparsity structure of all of them; `Dense` leaves the model as it is.
        density: share of the weights of these layers to keep, in (0, 1].
        distribution: `"uniform"`; `"erk"` (Erdos-Renyi-Kernel: density of a layer proportional
            to (O + I) / (O * I), capped at 1, same total; RigL, section 3); or densities for
            patterns, the others keeping `density`.
        learner: creates the permutations; None for none.
        storage: `"packed"` or `"masked"`.
        topology: initial active units: random, or the largest of the present weights.
        rescale: multiply each row by sqrt(I / its active inputs), so that outputs keep the
            variance the dense initialisation gave them.
        seed: of topologies and permutations.

    Returns:
        The report. Each sparse weight's topology depends on the seed and its own position only.

    Raises:
        UserError: a pattern matches nothing, or a tied or unsuitable layer; an impossible density.
    """
    model_parameters = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(structure, Dense):
        return Report(type(structure).__name__, [], model_parameters)
    chosen = _match(model, rules)
    shapes = {
        f"{name}.weights.{part}": shape
        for name, rule in chosen.items()
        for part, shape in enumerate(_projection_shapes(name, model.get_submodule(name), rule))
    }
    densities = layer_densities(shapes, density, distribution)
    learner = NoPermutation() if learner is None else learner
    layers: list[LayerReport] = []
    for position, name in enumerate(chosen):
        generator = stream(seed, "sparsify", position)
        asked = {n: d for n, d in densities.items() if n.rpartition(".weights.")[0] == name}
        matrices = _dense_matrices(model.get_submodule(name), len(asked))
        weights = []
        for matrix, (weight_name, weight_density) in zip(matrices, asked.items(), strict=True):
            try:
                rows, columns = matrix.shape
                layout = structure.layout(rows, columns, weight_density)
            except UserError as error:
                raise UserError(f"{error} (layer {weight_name})") from None
            if topology == "magnitude":
                active = layout.best_units(layout.unit_rms(matrix))
            else:
                active = layout.random_units(generator)
            weight = SparseWeight(layout, active, matrix, storage)
            if rescale:
                _rescale_rows(weight)
            weights.append(weight)
        layer, side = _with_permutations(
            weights, _bias(model.get_submodule(name)), structure, learner, generator
        )
        layer.to(matrices[0].device).train(model.get_submodule(name).training)
        model.set_submodule(name, layer)
        layers += [_row(n, w, asked[n], side) for n, w in zip(asked, weights, strict=True)]
    return Report(type(structure).__name__, layers, model_parameters)


def _match(model: nn.Module, rules: Sequence[Rule]) -> dict[str, Rule]:
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    chosen: dict[str, Rule] = {}
    for rule in rules:
        names = [name for name in modules if name and fnmatchcase(name, rule.pattern)]
        if not names:
            raise UserError(
                f"sparse: pattern '{rule.pattern}' matches no layer of the model; "
                f"linear layers are {_some_linear_names(modules)}"
            )
        for name in names:
            weight = getattr(modules[name], "weight", None)
            if not _is_linear(modules[name]) or not isinstance(weight, nn.Parameter):
                raise UserError(
                    f"sparse: pattern '{rule.pattern}' matches '{name}', a "
                    f"{type(modules[name]).__name__}; only linear layers can be made sparse"
                )
            if len(owners[id(weight)]) > 1:
                raise UserError(
                    f"sparse: pattern '{rule.pattern}' matches '{name}', whose weight is tied: "
                    f"{' and '.join(owners[id(weight)])}"
                )
            chosen.setdefault(name, rule)
    return {name: chosen[name] for name in modules if name in chosen}


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer that stores its weight transposed, as [I, O].
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _some_linear_names(modules: Mapping[str, nn.Module]) -> str:
    names = [name for name, module in modules.items() if _is_linear(module)]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "none"


def _projection_shapes(name: str, module: nn.Module, rule: Rule) -> list[tuple[int, int]]:
    rows, columns = _matrix(module).shape
    if rule.split < 1 or rows % rule.split:
        raise UserError(
            f"sparse: pattern '{rule.pattern}' has split={rule.split}, which does not divide the "
            f"{rows} outputs of '{name}'"
        )
    return [(rows // rule.split, columns)] * rule.split


def _matrix(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if _is_transposed(module) else weight.detach()


def _dense_matrices(module: nn.Module, split: int) -> list[Tensor]:
    return [part.contiguous() for part in _matrix(module).chunk(split)]


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def _rescale_rows(weight: SparseWeight) -> None:
    entries = weight.layout.entries(weight.active.long())
    num_rows, num_columns = weight.layout.shape
    rows = (entries // num_columns).clamp(max=num_rows)
    fan_in = torch.bincount(rows.flatten(), minlength=num_rows + 1)
    factor = (num_columns / fan_in.clamp(min=1)).sqrt().to(weight.values.dtype)
    with torch.no_grad():
        if weight.storage == "packed":
            weight.values.mul_(factor[rows])
        else:
            weight.values.mul_(factor[:num_rows, None])


def _with_permutations(
    weights: list[SparseWeight],
    bias: Tensor | None,
    structure: Structure,
    learner: Learner,
    generator: torch.Generator,
) -> tuple[SparseLinear, str]:
    rows, columns = weights[0].layout.shape
    side: str = learner.side
    if side == "auto":
        # Fused projections share one input-side matrix, the cheapest there is.
        side = "in" if len(weights) > 1 else structure.auto_side(rows, columns)
    inputs = learner.create(columns, generator) if side in ("in", "both") else None
    outputs: list[Permutation | None] = [
        learner.create(rows, generator) if side in ("out", "both") else None for _ in weights
    ]
    device = weights[0].values.device
    for permutation in (inputs, *outputs):
        if permutation is not None:
            permutation.to(device)
    has_any = inputs is not None or any(output is not None for output in outputs)
    return SparseLinear(weights, bias, inputs, outputs), side if has_any else "none"


def _row(name: str, weight: SparseWeight, asked: float, side: str) -> LayerReport:
    layout = weight.layout
    return LayerReport(
        name=name,
        shape=layout.shape,
        density_asked=asked,
        density=layout.density,
        active_units=layout.num_active,
        unit_entries=layout.unit_size,
        static=weight.static,
        side=side,
        parameters=layout.num_entries,
        macs_dense=layout.shape[0] * layout.shape[1],
        macs_sparse=layout.num_entries,
    )
