"""Topologies and permutations of the sparse weights that are timed: those of trained models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from padst_exp.bench.configurations import Shape
from padst_exp.bench.session import Session
from padst_exp.structures import Layout, Product, Structure, Unstructured, permuted_entries
from padst_exp.structures.folding import joined_output


@dataclass(frozen=True)
class Topology:
    """Where the entries of one sparse weight are.

    Args:
        structure: of each of its projections.
        layouts: of them, all alike.
        units: int64 `[N]` for each.
        input_index: int64 `[I]`, or None for the identity.
        output_indices: int64 `[O]`, or None, for each.
    """

    structure: Structure
    layouts: Sequence[Layout]
    units: Sequence[Tensor]
    input_index: Tensor | None
    output_indices: Sequence[Tensor | None]

    @property
    def permutation(self) -> str:
        """As in `report.Line`."""
        indices = self.input_index, *self.output_indices
        return "none" if all(index is None for index in indices) else "hard"

    @property
    def shape(self) -> tuple[int, int]:
        """`[O, I]` of all projections."""
        return sum(layout.shape[0] for layout in self.layouts), self.layouts[0].shape[1]

    def plain(self) -> Topology:
        """The same without permutations."""
        return replace(self, input_index=None, output_indices=[None] * len(self.layouts))

    def entries(self) -> Tensor:
        """Flat positions in the permuted weight, int64; O * I where outside."""
        return permuted_entries(self.layouts, self.units, self.input_index, self.output_indices)

    def output_index(self) -> Tensor | None:
        """Int64 `[O]` of all projections, or None."""
        return joined_output(self.layouts, self.output_indices)

    def fold(self, product: Product) -> None:
        """Derive the indices of a product."""
        product.fold(self.units, self.input_index, self.output_indices)


def is_permuted(structure: Structure) -> bool:
    """Whether models with this structure learn permutations: those whose accuracy is known did."""
    return not isinstance(structure, Unstructured)


def topology(session: Session, shape: Shape, structure: Structure, density: float) -> Topology:
    """A random one, with a random permutation where training puts a learned one.

    Raises:
        UserError: the structure cannot hold that density in this shape.
    """
    rows, columns = shape.out_features // shape.split, shape.in_features
    layout = structure.layout(rows, columns, density)
    layouts = [layout] * shape.split
    # As `sparsify` chooses where it is to choose the side.
    side = "in" if shape.split > 1 else structure.auto_side(rows, columns)

    def shuffled(size: int, on: str) -> Tensor | None:
        permuted = is_permuted(structure) and side == on
        return torch.randperm(size).to(session.device) if permuted else None

    return Topology(
        structure,
        layouts,
        [layout.random_units(torch.default_generator).to(session.device) for _ in layouts],
        shuffled(columns, "in"),
        [shuffled(rows, "out") for _ in layouts],
    )
