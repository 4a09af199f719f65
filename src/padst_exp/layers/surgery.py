"""One dense layer made sparse: its permutations, its first units, its values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from padst_exp.dst import Algorithm
from padst_exp.errors import UserError, require
from padst_exp.layers.exchange import Place
from padst_exp.layers.low_rank import LowRank
from padst_exp.layers.mask_gate import move_mask
from padst_exp.layers.move import check_active
from padst_exp.layers.sparse_linear import SparseLinear
from padst_exp.layers.sparse_weight import SparseWeight
from padst_exp.layers.views import LinearView
from padst_exp.permutations import Partition, Permutation, PermutationLearner, Site, is_bijection
from padst_exp.pools import TRAITS
from padst_exp.structures import (
    Geometry,
    Storage,
    Structure,
    best_units,
    random_units,
    scatter_entries,
)

Scoring = Literal["random", "magnitude"] | Mapping[str, Tensor]

# Of the norm of its input; a soft permutation that leaves less has no inverse worth the name.
LEAST_GAIN = 0.5


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What sparse layers take over from others, by the names of their weights and permutations.

    Args:
        units: int64 `[N]`, sorted ids of the first active units of every weight, e.g. by
            `fc1.weights.0`; None: they are chosen as usual.
        row_orders: int64 `[O]`, see `Geometry.with_row_order`; of some weights.
        indices: int64 `[d]`, of every permutation, e.g. by `fc1.input_permutation`, hard from the
            start; None: their learner decides.
        units_from, indices_from: where they come from, as messages say it, with their key.
    """

    units: Mapping[str, Tensor] | None = None
    row_orders: Mapping[str, Tensor] = field(default_factory=dict)
    indices: Mapping[str, Tensor] | None = None
    units_from: str = "units"
    indices_from: str = "indices"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one weight is cut, before anything of it is chosen.

    Args:
        name: of the weight.
        geometry: its units and pools.
        counts: int64 `[P]`, active units of each pool at first.
        target: int64 `[P]`, those that the asked density stands for.
    """

    name: str
    geometry: Geometry
    counts: Tensor
    target: Tensor

    def best(self, importance: Tensor, counts: Tensor) -> Tensor:
        """The units of the largest mean `importance` `[O, I]`: sorted ids, int64 `[N]`."""
        return best_units(self.geometry, counts, self.geometry.unit_rms(importance.sqrt()))

    def kept(self, importance: Tensor) -> Tensor:
        """Bool `[O, I]`: the entries of these units, as many as are to stay in the end."""
        entries = self.geometry.entries(self.best(importance, self.target).to(importance.device))
        inside = torch.ones_like(entries, dtype=torch.bool)
        return scatter_entries(inside, entries, self.geometry.shape)


@dataclass(frozen=True, kw_only=True)
class Surgery:
    """Makes dense layers sparse; see `sparsify` for what is asked.

    Args:
        structure, densities, learner, algorithm, low_rank, storage, topology: as there; a density
            for every sparse weight by name.
        fresh: whether weights are as they were initialised, so that nothing is lost with them.
        taken: what is neither drawn nor chosen here.
    """

    structure: Structure
    densities: Mapping[str, float]
    learner: PermutationLearner
    algorithm: Algorithm | None
    low_rank: int
    storage: Storage
    topology: Scoring
    fresh: bool
    taken: Taken

    def __call__(
        self, found: LinearView, split: int, generator: torch.Generator, *, is_output: bool
    ) -> tuple[SparseLinear, str]:
        """The layer that is to take the place of `found`, and the side of its permutations.

        Args:
            found: the dense layer; stays as it is.
            split: how many weights its outputs are split into.
            generator: draws topology and permutations.
            is_output: whether its outputs are those of the model.

        Raises:
            UserError: what is asked cannot be done; names the weight.
        """
        matrix, trains = found.matrix.contiguous(), found.parameter.requires_grad
        rank = self.low_rank if trains else 0
        algorithm = self.algorithm if trains else None
        companion_density = rank * sum(matrix.shape) / matrix.numel()
        cuts = [
            self._cut(f"{found.name}.weights.{part}", piece, companion_density, algorithm)
            for part, piece in enumerate(matrix.chunk(split))
        ]
        importance = self._importance(found, matrix)
        units: list[Tensor] = []
        if self.fresh:
            units = self._units(cuts, importance, generator)
        sides = Sides(found, cuts)
        worth = matrix.square() if importance is None else importance
        side = sides.create(self.learner, self.structure, None if self.fresh else worth, generator)
        sides.take(self.taken)
        if not trains:
            sides.harden()
        if not self.fresh:
            sides.require_invertible(self.learner)
            matrix = sides.undo(matrix)
            if importance is not None:
                importance = sides.undo_nearest(importance)
            units = self._units(cuts, importance, generator)
        weights = []
        for part, (cut, piece) in enumerate(zip(cuts, matrix.chunk(split), strict=True)):
            partition = sides.partition(part)
            weight = SparseWeight(
                cut.geometry,
                units[part] if partition is None else cut.geometry.unit_ids(),
                piece.contiguous(),
                self.storage,
                target=cut.target,
                is_output=is_output,
            )
            if partition is not None:
                kind: Literal["in", "out"] = "in" if partition is sides.inputs else "out"
                taps = found.taps if kind == "in" else 1
                move_mask(Place(cut.name, weight, kind, taps), partition, units[part])
            elif algorithm is not None:
                weight.select(algorithm.selection(weight.topology(), generator))
            if self.fresh:
                rescale_rows(weight)
            weight.values.requires_grad_(trains)
            weights.append(weight)
        companion = LowRank(matrix.shape[0], matrix.shape[1], rank, generator) if rank else None
        layer = found.build(weights, found.bias_tensor, sides.inputs, sides.outputs, companion)
        if algorithm is not None and algorithm.silences_rows:
            layer.silences_rows = True
            layer.index()
        return layer.to(matrix.device).train(found.module.training), side

    def _cut(
        self, name: str, matrix: Tensor, companion_density: float, algorithm: Algorithm | None
    ) -> Cut:
        try:
            density = self.densities[name] - companion_density
            if density <= 0:
                highest = math.ceil(self.densities[name] / (companion_density / self.low_rank)) - 1
                wanted = f"at most {highest}, which leaves entries to the sparse weight"
                require(False, "low_rank", self.low_rank, wanted)
            rows, columns = matrix.shape
            geometry = self.structure.geometry(rows, columns, density)
            if algorithm is not None:
                _check_served(algorithm, self.structure, geometry)
        except UserError as error:
            raise UserError(f"{error} (layer {name})") from None
        counts = target = self.structure.initial_counts(geometry, density)
        if algorithm is not None and (start := algorithm.initial_density(density)) != density:
            if self.learner.moves_masks:
                kind = type(algorithm).__name__
                wanted = "dst: expected one that starts at the density asked, as rigl does, with a"
                raise UserError(f"{wanted} permutation that moves masks, got {kind} (layer {name})")
            counts = self.structure.initial_counts(geometry, start)
        if (order := self.taken.row_orders.get(name)) is not None:
            if order.shape != (rows,) or not is_bijection(order):
                source = self.taken.units_from
                raise UserError(f"{source}, where {name} has no order of its {rows} rows")
            geometry = geometry.with_row_order(order)
        return Cut(name=name, geometry=geometry, counts=counts, target=target)

    def _importance(self, found: LinearView, matrix: Tensor) -> Tensor | None:
        """What every entry is worth, `[O, I]`; None where units are drawn."""
        if self.topology == "random":
            return None
        if self.topology == "magnitude":
            return matrix.square()
        assert not isinstance(self.topology, str)
        return self.topology[found.name].to(matrix).contiguous()

    def _units(
        self, cuts: Sequence[Cut], importance: Tensor | None, generator: torch.Generator
    ) -> list[Tensor]:
        """The first active units of every weight."""
        if importance is None:
            # Also where others are taken: what is drawn next does not depend on it.
            drawn = [random_units(cut.geometry, cut.counts, generator) for cut in cuts]
        if self.taken.units is not None:
            return [self._taken_units(cut, self.taken.units) for cut in cuts]
        if importance is None:
            return drawn
        parts = importance.chunk(len(cuts))
        return [cut.best(part, cut.counts) for cut, part in zip(cuts, parts, strict=True)]

    def _taken_units(self, cut: Cut, units: Mapping[str, Tensor]) -> Tensor:
        source, sizes = self.taken.units_from, cut.geometry.unit_sizes
        if (active := units.get(cut.name)) is None:
            raise UserError(f"{source}, which has no weight {cut.name}")
        try:
            check_active(cut.geometry, active)
        except ValueError as error:
            raise UserError(f"{source}, where {error} ({cut.name})") from error
        entries = int(sizes[active // cut.geometry.pool_size].sum())
        expected = int((cut.counts * sizes).sum())
        if entries != expected:
            raise UserError(
                f"{source}, where {cut.name} has {entries} entries; it starts with {expected} here"
            )
        return active


class Sides:
    """The permutations on both sides of a layer that is being made.

    Args:
        found: the dense layer.
        cuts: of its weights.

    Attributes:
        inputs: shared by all weights, or None.
        outputs: one for each, or None.
    """

    def __init__(self, found: LinearView, cuts: Sequence[Cut]) -> None:
        self.found = found
        self.cuts = cuts
        self.inputs: Permutation | None = None
        self.outputs: list[Permutation | None] = [None for _ in cuts]

    def create(
        self,
        learner: PermutationLearner,
        structure: Structure,
        importance: Tensor | None,
        generator: torch.Generator,
    ) -> str:
        """Let `learner` make them, the input's first; returns the side they act on.

        Args:
            learner: decides which sides there are.
            structure: decides where the learner leaves it open.
            importance: `[O, I]`; None: the weights are fresh.
            generator: draws them.
        """
        rows, taps = self.cuts[0].geometry.shape[0], self.found.taps
        side: str = learner.side
        if side == "auto":
            # Fused projections count as one tall weight: they share the input-side matrix.
            side = structure.auto_side(len(self.cuts) * rows, self.found.features)
        if side in ("in", "both"):

            def best_columns(table: Tensor) -> Tensor:
                parts = table.view(len(self.cuts) * rows, -1).chunk(len(self.cuts))
                kept = [cut.kept(part) for cut, part in zip(self.cuts, parts, strict=True)]
                return torch.cat(kept).view_as(table)

            table = None if importance is None else importance.view(-1, self.found.features)
            site = Site(size=self.found.features, importance=table, best=best_columns)
            self.inputs = self._placed(learner.fit(site, generator))
        if side in ("out", "both"):
            parts: Sequence[Tensor | None] = [None for _ in self.cuts]
            if importance is not None:
                # As the outputs find it: columns stand in the slots of the inputs.
                parts = _columns(importance, _nearest(self.inputs), taps).chunk(len(self.cuts))
            for i, (cut, part) in enumerate(zip(self.cuts, parts, strict=True)):

                def best_rows(table: Tensor, cut: Cut = cut) -> Tensor:
                    return cut.kept(table.T).T

                table = None if part is None else part.T
                site = Site(size=rows, importance=table, best=best_rows)
                made = self._placed(learner.fit(site, generator))
                # Row f of W is row index[f] of S: the inverse of what slot f holds.
                if made is not None and not made.soft and part is not None:
                    made.harden(made.index.argsort())
                self.outputs[i] = made
        return side if self.all() else "none"

    def partition(self, part: int) -> Partition | None:
        """What moves the mask of one of the weights, if anything does."""
        for found in (self.inputs, self.outputs[part]):
            if isinstance(found, Partition) and found.soft:
                return found
        return None

    def all(self) -> dict[str, Permutation]:
        """Those that there are, by name."""
        name = self.found.name
        each = {f"{name}.input_permutation": self.inputs}
        each |= {f"{name}.output_permutations.{i}": p for i, p in enumerate(self.outputs)}
        return {key: permutation for key, permutation in each.items() if permutation is not None}

    def take(self, taken: Taken) -> None:
        """Let them be those that are given, hard."""
        if taken.indices is None:
            return
        own, here = self.all(), f"{self.found.name}."
        for name in taken.indices:
            if name.startswith(here) and name not in own:
                raise UserError(f"{taken.indices_from} with {name}, where there is none here")
        for name, permutation in own.items():
            index = taken.indices.get(name)
            if index is None:
                raise UserError(f"{taken.indices_from}, which has no {name}")
            if index.shape != (permutation.size,) or not is_bijection(index):
                raise UserError(f"{taken.indices_from}, where {name} has {len(index)} features")
            permutation.harden(index.to(permutation.index.device))

    def harden(self) -> None:
        """Let nothing be learned of them."""
        for permutation in self.all().values():
            if permutation.soft:
                permutation.harden()

    def require_invertible(self, learner: PermutationLearner) -> None:
        """Refuse soft ones that would scramble trained weights."""
        for name, permutation in self.all().items():
            if (gain := float(permutation.gain().detach())) < LEAST_GAIN:
                raise UserError(
                    "permutation: expected one that trained weights can be read through, such as "
                    f"none or random, got {type(learner).__name__}, whose soft start leaves "
                    f"{gain:.2f} of a norm ({name})"
                )

    def undo(self, matrix: Tensor) -> Tensor:
        """S = P_out^-1 W P_in^-1 for W `[O, I]`."""
        if self.inputs is not None and self.inputs.soft:
            inverse = _inverse(self.inputs, matrix)
            matrix = (matrix.view(-1, self.inputs.size) @ inverse).view_as(matrix)
        elif self.inputs is not None:
            matrix = _columns(matrix, self.inputs.index, self.found.taps)
        parts = list(matrix.chunk(len(self.cuts)))
        for i, permutation in enumerate(self.outputs):
            if permutation is not None and permutation.soft:
                parts[i] = _inverse(permutation, matrix) @ parts[i]
            elif permutation is not None:
                parts[i] = parts[i][permutation.index.argsort()]
        return torch.cat(parts)

    def undo_nearest(self, matrix: Tensor) -> Tensor:
        """The same by the nearest hard ones, which keep every entry."""
        parts = list(_columns(matrix, _nearest(self.inputs), self.found.taps).chunk(len(self.cuts)))
        for i, permutation in enumerate(self.outputs):
            if (index := _nearest(permutation)) is not None:
                parts[i] = parts[i][index.argsort()]
        return torch.cat(parts)

    def _placed(self, permutation: Permutation | None) -> Permutation | None:
        return None if permutation is None else permutation.to(self.found.parameter.device)


def _nearest(permutation: Permutation | None) -> Tensor | None:
    return None if permutation is None else permutation.nearest()


def _columns(matrix: Tensor, index: Tensor | None, taps: int) -> Tensor:
    """`[O, I]` with the features of every tap in the order of `index`."""
    if index is None:
        return matrix
    return matrix.view(len(matrix), taps, -1)[..., index].flatten(1)


def _inverse(permutation: Permutation, like: Tensor) -> Tensor:
    return torch.linalg.inv(permutation.relaxed().detach().double()).to(like)


def _check_served(algorithm: Algorithm, structure: Structure, geometry: Geometry) -> None:
    """Refuse an algorithm that makes no sense on units and pools like these."""
    for trait in sorted(algorithm.requires - geometry.traits):
        wanted = f"{TRAITS[trait]} as this dst needs"
        require(False, "structure", type(structure).__name__, wanted)


@torch.no_grad()
def rescale_rows(weight: SparseWeight) -> None:
    """Multiply rows by sqrt(I / active inputs), for the variance of the dense initialisation."""
    entries = weight.entries()
    num_rows, num_columns = weight.shape
    rows = (entries // num_columns).clamp(max=num_rows)
    if weight.selection is None:
        fan_in = torch.bincount(rows.flatten(), minlength=num_rows + 1)
    else:
        # As many inputs as hold the share of a row's square that stays once the selection is hard.
        square = weight.unweighed().double().square()
        shares = weight.selection.shares().detach().double()
        left = square * (shares[:, None] if shares.dim() == 1 else shares)
        whole, left = (
            torch.bincount(rows.flatten(), part.flatten(), num_rows + 1) for part in (square, left)
        )
        fan_in = num_columns * left / whole.clamp_min(torch.finfo(whole.dtype).tiny)
    factor = (num_columns / fan_in.clamp(min=1)).sqrt().to(weight.values.dtype)
    if weight.storage == "packed":
        weight.values.mul_(factor[rows])
    else:
        weight.values.mul_(factor[:num_rows, None])
