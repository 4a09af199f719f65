"""What somebody adds from outside the package: one class each, found by `_target_`."""

from __future__ import annotations

import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from padst_exp.dst import DropScore, Signals, Topology
from padst_exp.permutations import DoublyStochastic, Permutation
from padst_exp.permutations.permutation import assign
from padst_exp.structures import Geometry, Structure, Tiling


class Arrow(Structure):
    """Blocks of a fixed pattern: the first block row and column, and the diagonal.

    Args:
        size: of the blocks.
    """

    def __init__(self, *, size: int) -> None:
        self.size = size

    def geometry(self, out_features: int, in_features: int, density: float) -> Geometry:
        return ArrowGeometry(out_features, in_features, self.size)


class ArrowGeometry(Geometry):
    """Unit: one of the blocks; all other entries belong to none and are never active."""

    def __init__(self, out_features: int, in_features: int, size: int) -> None:
        rows, columns = -(-out_features // size), -(-in_features // size)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        pattern = (row == 0) | (column == 0) | (row % columns == column)
        self.blocks = torch.stack([row, column], -1)[pattern]
        # Only where all blocks are whole are units of equal size: one pool is enough.
        assert out_features % size == in_features % size == 0
        super().__init__(
            shape=(out_features, in_features),
            candidates=torch.tensor([len(self.blocks)]),
            unit_sizes=torch.tensor([size * size]),
            frame=(1, size, size),
        )
        self.size = size

    def cells(self, units: Tensor) -> tuple[Tensor, Tensor]:
        step = torch.arange(self.size, device=units.device)
        row, column = (self.blocks.to(units.device)[units] * self.size).T
        rows, columns = torch.broadcast_tensors(
            row[:, None, None] + step[None, :], column[:, None, None] + step[:, None]
        )
        return rows.flatten(1), columns.flatten(1)

    def tiling(self) -> Tiling:
        # Tiles multiply by the same kernels as those of any structure.
        return Tiling(
            width=self.size,
            height=self.size,
            locate=self._locate,
            num_row_groups=self.shape[0] // self.size,
            ascending=True,
        )

    def _locate(self, units: Tensor) -> tuple[Tensor, Tensor]:
        row, column = self.blocks.to(units.device)[units].T
        return column[:, None] * self.size + torch.arange(self.size, device=units.device), row


class WeightAndGradient(DropScore):
    """|w| + lambda |gradient| (MEST, Yuan et al. 2021).

    Args:
        gradient: lambda.
    """

    needs = frozenset({"weight_gradient"})

    def __init__(self, *, gradient: float) -> None:
        self.gradient = gradient

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        assert signals.weight_gradient is not None
        return signals.magnitude + self.gradient * signals.weight_gradient


class Hardest(Permutation):
    """Multiplies by its nearest permutation, and differentiates as the soft matrix."""

    def matrix(self) -> Tensor:
        if self.logits is None:
            return super().matrix()
        soft = self.relaxed()
        hard = torch.zeros_like(soft).scatter_(1, assign(soft)[:, None], 1.0)
        return hard + soft - soft.detach()


class StraightThrough(DoublyStochastic):
    """Learns by the gradient of a soft matrix what the hard one would change."""

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        drawn = super().create(size, generator)
        if drawn is None or drawn.logits is None:
            return drawn
        return Hardest(drawn.logits, projected=self.projected, iterations=self.iterations)


def resnet18(*, image_size: int, channels: int, num_classes: int) -> nn.Module:
    """timm's ResNet-18."""
    return ResNet(BasicBlock, (2, 2, 2, 2), in_chans=channels, num_classes=num_classes)
