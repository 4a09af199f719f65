"""Single entries: dense (all of them) and unstructured (any of them)."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_exp.structures.geometry import Geometry
from padst_exp.structures.structure import Structure, require_units


class Dense(Structure):
    """No sparsity: `sparsify` leaves the layers of the model as they are."""

    def geometry(self, out_features: int, in_features: int, density: float) -> Geometry:
        return EntryGeometry(out_features, in_features)


class Unstructured(Structure):
    """Unit: one entry. Pool: the whole weight."""

    def geometry(self, out_features: int, in_features: int, density: float) -> Geometry:
        require_units(density * out_features * in_features, 1, out_features, in_features, "a unit")
        return EntryGeometry(out_features, in_features)


class EntryGeometry(Geometry):
    """Geometry of single entries in one pool."""

    traits = frozenset({"grid"})

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(
            shape=(out_features, in_features),
            candidates=torch.tensor([out_features * in_features]),
            unit_sizes=torch.ones(1, dtype=torch.int64),
            frame=(1, 1, 1),
        )

    def cells(self, units: Tensor) -> tuple[Tensor, Tensor]:
        units = units[:, None]
        return units // self.shape[1], units % self.shape[1]

    def _permuted_axes(self, dense: Tensor) -> Tensor:
        return dense.reshape(-1, 1)
