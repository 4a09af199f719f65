"""Blocks of any rows and any columns: what DSB trains."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_exp.structures.geometry import Geometry
from padst_exp.structures.nm import NMGeometry
from padst_exp.structures.structure import Structure, check_positive, require_units, share_budget


class ShuffledBlock(Structure):
    """Unit: a `size` x 1 vector. Pool: the whole weight. A block is `size` units of one row group.

    Which rows form a group an update may decide anew, and every group reads any columns, so that
    a block is a submatrix of `size` arbitrary rows and as many columns (DSB, Jiang et al. 2022).

    Args:
        size: rows of a group, and columns of a block.
    """

    def __init__(self, *, size: int) -> None:
        self.size = check_positive("size", size)

    def geometry(self, out_features: int, in_features: int, density: float) -> Geometry:
        height, width = min(self.size, out_features), min(self.size, in_features)
        wanted = density * out_features * in_features
        what = f"a {self.size}x{self.size} block"
        smaller = "a smaller structure.size"
        require_units(wanted, height * width, out_features, in_features, what, smaller)
        return ShuffledBlockGeometry(out_features, in_features, self.size)

    def initial_counts(self, geometry: Geometry, density: float) -> Tensor:
        # Whole blocks.
        size = geometry.shape[0] * geometry.shape[1]
        width = min(self.size, geometry.shape[1])
        blocks = geometry.candidates // width
        counts = share_budget(density * size, blocks, geometry.unit_sizes * width) * width
        return geometry.candidates if density == 1 else counts

    def auto_side(self, out_features: int, in_features: int) -> str:
        # Inputs are free already.
        return "out"


class ShuffledBlockGeometry(NMGeometry):
    """Geometry of `ShuffledBlock`: column c of row group g is unit g * I + c.

    Row groups of equal height are one pool, a lower last one is another.
    """

    def __init__(self, out_features: int, in_features: int, size: int) -> None:
        super().__init__(out_features, in_features, 1, size)
        full = out_features // self.group
        numbers = [full] + ([1] if self.num_groups > full else [])
        Geometry.__init__(
            self,
            shape=self.shape,
            candidates=torch.tensor(numbers) * in_features,
            unit_sizes=torch.tensor([self.group, out_features - full * self.group][: len(numbers)]),
            frame=(1, 1, self.group),
        )
        self.traits = frozenset({"grid", "shuffled_blocks"})

    def _place(self, units: Tensor) -> tuple[Tensor, Tensor]:
        row_group = units // self.shape[1]
        return row_group, units - row_group * self.shape[1]

    def random_scores(self, generator: torch.Generator) -> Tensor:
        # One number for each block of a random partition of the columns of a group.
        num_columns = self.shape[1]
        order = torch.rand(self.num_groups, num_columns, generator=generator).argsort(1)
        blocks = torch.rand(self.num_groups, -(-num_columns // self.group), generator=generator)
        # A last narrow block comes last of its group, or it would be cut from the next one.
        if num_columns % self.group:
            blocks[:, -1] = -1
        scores = blocks.gather(1, order.argsort(1) // self.group)
        table = scores.new_zeros(self.num_pools * self.pool_size)
        table[: scores.numel()] = scores.flatten()
        return table.view(self.num_pools, self.pool_size)
