"""N:M: the same number of inputs in every chunk, for every group of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_exp.errors import UserError
from padst_exp.pools import Symmetry
from padst_exp.structures.geometry import MIN_TILE_HEIGHT, Geometry, Tiling
from padst_exp.structures.structure import Structure, check_positive


class NM(Structure):
    """Unit: a `group` x 1 vector. Pool: one chunk of inputs for one group of `group` rows.

    A row keeps k = n * round(density * I / n) inputs, n in each of k / n chunks of nearly equal
    width. Any sparsity is met exactly, and where m divides I this is the textbook N:M.

    Args:
        n: active inputs per chunk.
        m: width of a chunk, or None to derive it from the sparsity.
        group: rows that share their inputs; 1 is the textbook form and the paper's.
    """

    def __init__(self, *, n: int, m: int | None, group: int) -> None:
        self.n = check_positive("n", n)
        self.m = None if m is None else check_positive("m", m)
        self.group = check_positive("group", group)
        if m is not None and n > m:
            raise UserError(f"structure.n: {n}:{m} keeps more than all, expected n <= m = {m}")

    def geometry(self, out_features: int, in_features: int, density: float) -> Geometry:
        if self.m is not None and abs(density - self.n / self.m) > 5e-4:
            raise UserError(
                f"structure.m: {self.n}:{self.m} means sparsity {1 - self.n / self.m:.4g}, but "
                f"sparsity is {1 - density:.4g}; set sparsity={1 - self.n / self.m:.4g} or "
                "structure.m=null to derive m"
            )
        num_chunks = round(density * in_features / self.n)
        if num_chunks < 1 or num_chunks * self.n > in_features:
            nearest = 1 - min(max(num_chunks, 1), in_features // self.n) * self.n / in_features
            raise UserError(
                f"sparsity: {1 - density:.6g} leaves {density * in_features:.3g} of {in_features} "
                f"inputs to each row, but structure.n={self.n} needs a multiple of {self.n}; the "
                f"nearest legal sparsity is {nearest:.4f}"
                if in_features >= self.n
                else f"structure.n: {self.n} is more than the {in_features} inputs of a layer"
            )
        return NMGeometry(out_features, in_features, num_chunks, self.group)

    def initial_counts(self, geometry: Geometry, density: float) -> Tensor:
        # n of each chunk at the density that cut the chunks, elsewhere as many as come nearest.
        assert isinstance(geometry, NMGeometry)
        exact = round(density * geometry.shape[1] / self.n) == geometry.num_chunks
        if exact:
            return torch.full_like(geometry.candidates, self.n)
        return (geometry.candidates * density).round().to(torch.int64)

    def auto_side(self, out_features: int, in_features: int) -> str:
        # Row groups decide which rows share inputs, so of equal sides the row side says more.
        if self.group > 1 and out_features == in_features:
            return "out"
        return super().auto_side(out_features, in_features)


class NMGeometry(Geometry):
    """Geometry of `NM`. A unit's frame is one column of `group` rows."""

    def __init__(self, out_features: int, in_features: int, num_chunks: int, group: int) -> None:
        self.group = min(group, out_features)
        self.num_chunks = num_chunks
        bounds = torch.arange(num_chunks + 1) * in_features // num_chunks
        self.first_column = bounds[:-1]
        num_groups = -(-out_features // self.group)
        heights = torch.full((num_groups,), self.group)
        heights[-1] = out_features - self.group * (num_groups - 1)
        super().__init__(
            shape=(out_features, in_features),
            candidates=bounds.diff().repeat(num_groups),
            unit_sizes=heights.repeat_interleave(num_chunks),
            frame=(1, 1, self.group),
        )
        self.num_groups = num_groups
        self.chunk = None if in_features % num_chunks else in_features // num_chunks
        self.traits = frozenset({"grid", "neurons"} if num_chunks == 1 else {"grid"})

    def _place(self, units: Tensor) -> tuple[Tensor, Tensor]:
        # Products, since remainders of int64 take as long as quotients.
        pool = units // self.pool_size
        row_group = pool // self.num_chunks
        chunk, index = pool - row_group * self.num_chunks, units - pool * self.pool_size
        return row_group, self.first_column.to(units.device)[chunk] + index

    def cells(self, units: Tensor) -> tuple[Tensor, Tensor]:
        row_group, column = self._place(units)
        rows = row_group[:, None] * self.group + torch.arange(self.group, device=units.device)
        return rows, column[:, None].expand_as(rows)

    def _permuted_axes(self, dense: Tensor) -> Tensor:
        groups = dense.reshape(self.num_groups, self.group, -1)
        return groups.transpose(1, 2).reshape(-1, self.group)

    def tiling(self) -> Tiling | None:
        if self.group < MIN_TILE_HEIGHT:
            return None
        return Tiling(
            width=1,
            height=self.group,
            locate=self._locate,
            num_row_groups=self.num_groups,
            ascending=True,
        )

    def _locate(self, units: Tensor) -> tuple[Tensor, Tensor]:
        row_group, column = self._place(units)
        return column[:, None], row_group

    def _symmetry(self, side: str) -> Symmetry:
        features = torch.arange(self._features(side))
        if side == "out":
            return Symmetry(labels=features // self.group)
        return Symmetry(labels=torch.searchsorted(self.first_column, features, right=True) - 1)
