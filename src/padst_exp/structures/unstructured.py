"""Single entries: dense (all of them) and unstructured (any of them)."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_exp.structures.layout import Layout, share_budget
from padst_exp.structures.structure import Structure, require_units


class Dense(Structure):
    """No sparsity: `sparsify` leaves the layers of the model as they are."""

    def layout(self, out_features: int, in_features: int, density: float) -> Layout:
        return _EntryLayout(out_features, in_features, 1.0)


class Unstructured(Structure):
    """Unit: one entry. Pool: the whole weight."""

    def layout(self, out_features: int, in_features: int, density: float) -> Layout:
        require_units(density * out_features * in_features, 1, out_features, in_features, "a unit")
        return _EntryLayout(out_features, in_features, density)


class _EntryLayout(Layout):
    by_row = True

    def __init__(self, out_features: int, in_features: int, density: float) -> None:
        candidates = torch.tensor([out_features * in_features])
        sizes = torch.ones(1, dtype=torch.int64)
        super().__init__(
            shape=(out_features, in_features),
            candidates=candidates,
            unit_sizes=sizes,
            counts=share_budget(density * out_features * in_features, candidates, sizes),
            frame=(1, 1, 1),
        )

    def cells(self, units: Tensor) -> tuple[Tensor, Tensor]:
        units = units[:, None]
        return units // self.shape[1], units % self.shape[1]
