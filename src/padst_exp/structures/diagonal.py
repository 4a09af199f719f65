"""Pseudo-diagonals, single or in bundles.

The pseudo-diagonal of offset o in an R x C weight has min(R, C) cells: `((c + o) mod R, c)` when
R >= C, else `(r, (r + o) mod C)`. The transpose of one is again one (DynaDiag, appendix A).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from padst_exp.errors import UserError
from padst_exp.pools import Symmetry
from padst_exp.structures.geometry import MIN_TILE_HEIGHT, Geometry, Tiling
from padst_exp.structures.structure import Structure, check_positive, require_units


class Diagonal(Structure):
    """Unit: a pseudo-diagonal or a bundle of them. Pool: the whole weight.

    Args:
        bundle: `1` for single diagonals (the paper's structure), `"stride"` for whole residue
            classes of offsets modulo `stride` (a block-sparse layer after a fixed permutation),
            `"band"` for runs of `width` neighbouring offsets.
        stride: divides both dimensions of every layer; used by `bundle="stride"` only.
        width: offsets in a run; used by `bundle="band"` only.
    """

    def __init__(self, *, bundle: Literal[1, "stride", "band"], stride: int, width: int) -> None:
        self.bundle = bundle
        self.stride = check_positive("stride", stride)
        self.width = check_positive("width", width)

    def geometry(self, out_features: int, in_features: int, density: float) -> Geometry:
        shorter, longer = sorted((out_features, in_features))
        wanted = density * out_features * in_features
        if self.bundle == "stride":
            if out_features % self.stride or in_features % self.stride:
                raise UserError(
                    f"structure.stride: {self.stride} does not divide both sides of a "
                    f"{out_features}x{in_features} weight"
                )
            what = f"a class of diagonals modulo {self.stride}"
            size = shorter * longer // self.stride
            larger = "a larger structure.stride"
            require_units(wanted, size, out_features, in_features, what, larger)
            return StrideGeometry(out_features, in_features, self.stride)
        width = min(self.width, longer) if self.bundle == "band" else 1
        what = "a diagonal" if width == 1 else f"a band of {width} diagonals"
        smaller = "a smaller structure.width" if width > 1 else ""
        require_units(wanted, width * shorter, out_features, in_features, what, smaller)
        return BandGeometry(out_features, in_features, width)


class BandGeometry(Geometry):
    """Geometry of runs of `width` offsets (1: single diagonals). A last short run is a pool."""

    def __init__(self, out_features: int, in_features: int, width: int) -> None:
        shorter, longer = sorted((out_features, in_features))
        full, rest = divmod(longer, width)
        super().__init__(
            shape=(out_features, in_features),
            candidates=torch.tensor([full] + ([1] if rest else [])),
            unit_sizes=torch.tensor([width * shorter] + ([rest * shorter] if rest else [])),
            frame=(1, width, shorter),
        )
        self.width = width
        self.num_full = full

    def cells(self, units: Tensor) -> tuple[Tensor, Tensor]:
        num_rows, num_columns = self.shape
        pool, index = units // self.pool_size, units % self.pool_size
        run = torch.where(pool == 0, index, self.num_full)
        offsets = run[:, None] * self.width + torch.arange(self.width, device=units.device)
        step = torch.arange(min(self.shape), device=units.device)
        long = max(self.shape)
        along = (step + offsets[:, :, None]) % long
        # An offset beyond the last diagonal exists only in the frame of a short run.
        along = torch.where(offsets[:, :, None] < long, along, long).flatten(1)
        short = step.expand(len(units), self.width, -1).flatten(1)
        return (along, short) if num_rows >= num_columns else (short, along)

    def diagonal_offsets(self, units: Tensor) -> Tensor | None:
        return units if self.width == 1 and self.row_order is None else None

    def _symmetry(self, side: str) -> Symmetry:
        short, long, size = min(self.shape), max(self.shape), self._features(side)
        features, whole = torch.arange(size), self.width == long
        if size < long and not whole:
            return Symmetry(labels=features, kinds=features)
        # Neighbours that no run parts in any of the columns (or rows) are alike.
        starts = torch.arange(self.num_pools - 1 + self.num_full) * self.width
        parted = (starts[:, None] + torch.arange(short)) % long
        labels = torch.zeros(size, dtype=torch.int64)
        if not whole:
            labels[parted.flatten()] = 1
            labels = labels.cumsum(0) - 1
        num_classes = int(labels[-1]) + 1
        if short == 1:
            return Symmetry(labels=labels)
        if self.num_pools > 1:  # a last short run stays the last
            return Symmetry(labels=labels, kinds=torch.arange(num_classes))
        return Symmetry(labels=labels, step=num_classes // self.num_full)


class StrideGeometry(Geometry):
    """Geometry of offset classes modulo `stride`. A class is `stride` dense tiles.

    Rows of one residue share exactly the same columns, those of one other residue.
    """

    def __init__(self, out_features: int, in_features: int, stride: int) -> None:
        super().__init__(
            shape=(out_features, in_features),
            candidates=torch.tensor([stride]),
            unit_sizes=torch.tensor([out_features * in_features // stride]),
            frame=(stride, in_features // stride, out_features // stride),
        )
        self.stride = stride

    def _residues(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column residue, int64 `[N, stride]`, of the tiles of each class."""
        row = torch.arange(self.stride, device=units.device)
        shift = units[:, None] if self.shape[0] >= self.shape[1] else -units[:, None]
        column = (row - shift) % self.stride
        return row.expand_as(column), column

    def cells(self, units: Tensor) -> tuple[Tensor, Tensor]:
        _, width, height = self.frame
        row, column = self._residues(units)
        row_step = torch.arange(height, device=units.device) * self.stride
        column_step = torch.arange(width, device=units.device) * self.stride
        rows = row[:, :, None, None] + row_step[None, None, None, :]
        columns = column[:, :, None, None] + column_step[None, None, :, None]
        rows, columns = torch.broadcast_tensors(rows, columns)
        return rows.flatten(1), columns.flatten(1)

    def tiling(self) -> Tiling | None:
        _, width, height = self.frame
        if height < MIN_TILE_HEIGHT:
            return None
        rows, columns = torch.arange(self.shape[0]), torch.arange(self.shape[1])
        return Tiling(
            width=width,
            height=height,
            locate=self._locate,
            num_row_groups=self.stride,
            row_positions=(rows % self.stride) * height + rows // self.stride,
            num_column_groups=self.stride,
            column_positions=(columns % self.stride) * width + columns // self.stride,
        )

    def _locate(self, units: Tensor) -> tuple[Tensor, Tensor]:
        row, column = self._residues(units)
        steps = torch.arange(self.frame[1], device=units.device) * self.stride
        return (column[:, :, None] + steps).flatten(0, 1), row.flatten()

    def _symmetry(self, side: str) -> Symmetry:
        return Symmetry(labels=torch.arange(self._features(side)) % self.stride, step=1)
