"""Constant fan-in: every row, or every group of rows, reads the same number of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_exp.structures.geometry import Geometry
from padst_exp.structures.nm import NMGeometry
from padst_exp.structures.structure import Structure, check_positive, require_units


class FanIn(Structure):
    """Unit: a `group` x 1 vector. Pool: one group of `group` rows, free to read any inputs.

    SRigL's constant fan-in (Lasby et al. 2024) with `group=1`; with larger groups, rows that share
    one list of inputs (the upper bound of every permutation of inputs at the same cost).

    Args:
        group: rows that share their inputs; 1 is the paper's.
    """

    def __init__(self, *, group: int) -> None:
        self.group = check_positive("group", group)

    def geometry(self, out_features: int, in_features: int, density: float) -> Geometry:
        height = min(self.group, out_features)
        what = f"one input of all {out_features} rows"
        wanted = density * out_features * in_features
        require_units(wanted, out_features, out_features, in_features, what)
        return NMGeometry(out_features, in_features, 1, height)

    def initial_counts(self, geometry: Geometry, density: float) -> Tensor:
        # The whole part, as SRigL has it; 0.3 * 10 must not lose its third input to rounding.
        fan_in = int(density * geometry.shape[1] + 1e-9)
        return torch.full_like(geometry.candidates, fan_in)

    def auto_side(self, out_features: int, in_features: int) -> str:
        # Inputs are free already; which rows share them is all that a permutation can change.
        return "out" if self.group > 1 else super().auto_side(out_features, in_features)
