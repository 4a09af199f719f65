"""Square blocks on a fixed grid."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_exp.pools import Symmetry
from padst_exp.structures.geometry import MIN_TILE_HEIGHT, Geometry, Tiling
from padst_exp.structures.structure import Structure, check_positive, require_units


class Block(Structure):
    """Unit: one `size` x `size` block. Pool: the whole weight, or one block row (`balanced`).

    Where `size` does not divide a dimension, the narrower blocks at the edge form pools of their
    own, so that units of one pool stay equal.
    """

    def __init__(self, *, size: int, balanced: bool) -> None:
        self.size = check_positive("size", size)
        self.balanced = balanced

    def geometry(self, out_features: int, in_features: int, density: float) -> Geometry:
        height, width = min(self.size, out_features), min(self.size, in_features)
        wanted = density * out_features * in_features
        what = f"a {self.size}x{self.size} block"
        smaller = "a smaller structure.size"
        require_units(wanted, height * width, out_features, in_features, what, smaller)
        return BlockGeometry(out_features, in_features, self.size, self.balanced)


class BlockGeometry(Geometry):
    """Geometry of `Block`. A unit's frame is one tile of `size` columns by `size` rows."""

    traits = frozenset({"grid"})

    def __init__(self, out_features: int, in_features: int, size: int, balanced: bool) -> None:
        full_rows, edge_rows = divmod(out_features, size)
        full_columns, edge_columns = divmod(in_features, size)
        row_spans = [(row, 1) for row in range(full_rows)] if balanced else [(0, full_rows)]
        if edge_rows:
            row_spans.append((full_rows, 1))
        column_spans = [(0, full_columns)] + ([(full_columns, 1)] if edge_columns else [])
        # Pools in the order of their first block row keep the blocks of a balanced row together.
        spans = [
            (row, rows, column, columns)
            for row, rows in row_spans
            for column, columns in column_spans
            if rows * columns > 0
        ]
        self.first_row, num_rows, self.first_column, self.columns = torch.tensor(spans).T
        heights = torch.where(self.first_row == full_rows, edge_rows, size)
        widths = torch.where(self.first_column == full_columns, edge_columns, size)
        super().__init__(
            shape=(out_features, in_features),
            candidates=num_rows * self.columns,
            unit_sizes=heights * widths,
            frame=(1, size, size),
        )
        self.size = size

    def _blocks(self, units: Tensor) -> tuple[Tensor, Tensor]:
        pool, index = units // self.pool_size, units % self.pool_size
        columns = self.columns.to(units.device)[pool]
        row = self.first_row.to(units.device)[pool] + index // columns
        return row, self.first_column.to(units.device)[pool] + index % columns

    def cells(self, units: Tensor) -> tuple[Tensor, Tensor]:
        block_row, block_column = self._blocks(units)
        step = torch.arange(self.size, device=units.device)
        columns = block_column[:, None, None] * self.size + step[:, None]
        rows = block_row[:, None, None] * self.size + step[None, :]
        rows, columns = torch.broadcast_tensors(rows, columns)
        return rows.flatten(1), columns.flatten(1)

    def _permuted_axes(self, dense: Tensor) -> Tensor:
        blocks = dense.reshape(-1, self.size, self.shape[1] // self.size, self.size)
        return blocks.permute(0, 2, 3, 1).reshape(-1, self.size**2)

    def tiling(self) -> Tiling | None:
        if self.size < MIN_TILE_HEIGHT:
            return None
        num_rows, num_columns = self.shape
        return Tiling(
            width=self.size,
            height=self.size,
            locate=self._locate,
            num_row_groups=-(-num_rows // self.size),
            num_column_groups=-(-num_columns // self.size),
        )

    def _locate(self, units: Tensor) -> tuple[Tensor, Tensor]:
        block_row, block_column = self._blocks(units)
        columns = block_column[:, None] * self.size + torch.arange(self.size, device=units.device)
        return columns, block_row

    def _symmetry(self, side: str) -> Symmetry:
        return Symmetry(labels=torch.arange(self._features(side)) // self.size)
