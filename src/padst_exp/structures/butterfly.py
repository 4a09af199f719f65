"""Blocks of a flat block butterfly: a fixed pattern that reaches everything in few layers."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_exp.errors import UserError
from padst_exp.pools import Symmetry
from padst_exp.structures.block import BlockGeometry
from padst_exp.structures.geometry import Geometry
from padst_exp.structures.structure import Structure, check_positive, require_units, share_budget


class Butterfly(Structure):
    """Unit: one `size` x `size` block. Pool: the blocks of one stride (PixelatedBFly, Dao 2022).

    Rows and columns of blocks are stretched over a grid of b x b cells, b a power of two. The cell
    (r, c) belongs to the pattern where r = c (stride 0) or where r and c differ in one bit, of
    value 1, 2, 4, ... (the stride). A density takes whole strides in that order, k + 1 of them for
    (k + 1) / b, which is the paper's pattern; of the last one it takes what meets it exactly. All
    other entries belong to no unit. The paper's low-rank term is the run key `low_rank`.

    Args:
        size: rows and columns of a block.
    """

    def __init__(self, *, size: int) -> None:
        self.size = check_positive("size", size)

    def geometry(self, out_features: int, in_features: int, density: float) -> Geometry:
        height, width = min(self.size, out_features), min(self.size, in_features)
        wanted = density * out_features * in_features
        what = f"a {self.size}x{self.size} block"
        smaller = "a smaller structure.size"
        require_units(wanted, height * width, out_features, in_features, what, smaller)
        return ButterflyGeometry(out_features, in_features, self.size, density)

    def initial_counts(self, geometry: Geometry, density: float) -> Tensor:
        assert isinstance(geometry, ButterflyGeometry)
        left = density * geometry.shape[0] * geometry.shape[1]
        counts = torch.zeros_like(geometry.candidates)
        for stride in geometry.strides.unique().tolist():
            pools = geometry.strides == stride
            sizes = geometry.unit_sizes[pools]
            counts[pools] = share_budget(max(left, 0.0), geometry.candidates[pools], sizes)
            left -= float((counts[pools] * sizes).sum())
        return counts


class ButterflyGeometry(BlockGeometry):
    """Geometry of `Butterfly`: blocks of a table, where `BlockGeometry` has all of them.

    Attributes:
        strides: int64 `[P]`, the stride of the blocks of each pool, ascending.
    """

    def __init__(self, out_features: int, in_features: int, size: int, density: float) -> None:
        num_rows, num_columns = -(-out_features // size), -(-in_features // size)
        cells = 1 << (min(num_rows, num_columns).bit_length() - 1)
        rows, columns = torch.arange(num_rows)[:, None], torch.arange(num_columns)
        stride = (rows * cells // num_rows) ^ (columns * cells // num_columns)
        heights = torch.where(rows < out_features // size, size, out_features % size)
        widths = torch.where(columns < in_features // size, size, in_features % size)
        sizes = heights * widths

        wanted, held = density * out_features * in_features, 0.0
        pools: list[tuple[int, int, Tensor]] = []
        for next_stride in [0, *(1 << bit for bit in range(cells.bit_length() - 1))]:
            if held >= wanted * (1 - 1e-9):
                break
            inside = stride == next_stride
            # Blocks at the edges have pools of their own, so that units of one pool are equal.
            for entries in sizes[inside].unique().tolist():
                pools.append((next_stride, entries, (inside & (sizes == entries)).nonzero()))
            held += float(sizes[inside].sum())
        if held < wanted * (1 - 1e-9):
            least = 1 - held / (out_features * in_features)
            raise UserError(
                f"sparsity: expected at least {least:.4f}, all that a butterfly of {cells}x{cells} "
                f"cells holds of a {out_features}x{in_features} weight (or a smaller "
                f"structure.size), got {1 - density:.6g}"
            )
        candidates = torch.tensor([len(blocks) for _, _, blocks in pools])
        Geometry.__init__(
            self,
            shape=(out_features, in_features),
            candidates=candidates,
            unit_sizes=torch.tensor([entries for _, entries, _ in pools]),
            frame=(1, size, size),
        )
        self.size = size
        self.num_cells = cells
        self.strides = torch.tensor([at for at, _, _ in pools])
        self.table = torch.zeros(len(pools), self.pool_size, 2, dtype=torch.int64)
        for pool, (_, _, blocks) in enumerate(pools):
            self.table[pool, : len(blocks)] = blocks

    def _blocks(self, units: Tensor) -> tuple[Tensor, Tensor]:
        row, column = self.table.to(units.device).flatten(0, 1)[units].unbind(1)
        return row, column

    def _symmetry(self, side: str) -> Symmetry:
        # Blocks that a stretched cell holds are alike, those of other cells never.
        labels = super()._symmetry(side).labels
        num_blocks = int(labels[-1]) + 1
        cells = torch.arange(num_blocks) * self.num_cells // num_blocks
        return Symmetry(labels=labels, kinds=cells)
