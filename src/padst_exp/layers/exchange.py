"""What becomes of sparse weights when one of their permutations is exchanged for another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.dst import Change
from padst_exp.errors import UserError
from padst_exp.layers.sparse_linear import SparseLinear
from padst_exp.layers.sparse_weight import SparseWeight
from padst_exp.permutations import Evidence, Exchange, Permutation


@dataclass(frozen=True)
class Place:
    """One sparse weight S that a permutation acts on, y = S P x or y = P S x.

    On the input side slot i of S holds feature index[i]; on the output side row index[i] of S is
    feature i.

    Args:
        name: of the weight in its model.
        weight: S.
        side: of the permutation.
        taps: how many inputs stand for one feature: positions of a convolution's kernel.
    """

    name: str
    weight: SparseWeight
    side: Literal["in", "out"]
    taps: int

    def table(self, matrix: Tensor) -> Tensor:
        """`[..., O, I]` as `[..., R, d]`, whose columns are the slots of the permutation."""
        if self.side == "out":
            return matrix.mT
        return matrix.unflatten(-1, (self.taps, -1)).flatten(-3, -2)

    def matrix(self, table: Tensor) -> Tensor:
        """The same back again: `[R, d]` as `[O, I]`."""
        return table.T if self.side == "out" else table.reshape(self.weight.shape)

    @torch.no_grad()
    def change(self, before: Tensor, exchange: Exchange) -> Change:
        """The change of the topology that goes with exchanging `before` `[d]`.

        Units stay; with `carry`, each entry takes the value that its new feature had in its row.
        """
        weight, source, signs = self.weight, None, None
        if exchange.carry:
            if self.side == "in":
                origin = before.argsort()[exchange.index]
            else:
                origin = before[exchange.index.argsort()]
            source = sources(self, weight.entries(), origin)
        if exchange.signs is not None:
            signs = exchange.signs[self.slots(weight.entries())]
        return Change(weight.active.long(), source=source, signs=signs)

    def slots(self, entries: Tensor) -> Tensor:
        """The slot of each of `entries`, flat positions in S; any where they are outside."""
        num_rows, num_columns = self.weight.shape
        if self.side == "out":
            return (entries // num_columns).clamp(max=num_rows - 1)
        return entries % num_columns % (num_columns // self.taps)


def sources(place: Place, entries: Tensor, origin: Tensor) -> Tensor:
    """Where the values of `entries` are now, int64 like them: flat places, -1 where they are not.

    Args:
        place: the weight as it is.
        entries: int64, flat positions in S, O * I outside.
        origin: int64 `[d]`, the slot at which now stands what will be in each slot.
    """
    weight, slots = place.weight, place.slots(entries)
    num_rows, num_columns = weight.shape
    outside, step = num_rows * num_columns, num_columns if place.side == "out" else 1
    present = weight.entries()
    table = torch.full((outside + 1,), -1, device=entries.device)
    table[present.flatten()] = torch.arange(present.numel(), device=entries.device)
    table[outside] = -1
    moved = entries + (origin[slots] - slots) * step
    return table[torch.where(entries == outside, outside, moved)]


def places(model: nn.Module, permutation: Permutation) -> Iterator[Place]:
    """The sparse weights of `model` that `permutation` acts on."""
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLinear):
            continue
        for (side, part), found in layer.permutations().items():
            if found is not permutation:
                continue
            for i, weight in enumerate(layer.parts()):
                place = f"{name}.weights.{i}".removeprefix(".")
                if side == "in":
                    yield Place(place, weight, "in", layer.taps)
                elif i == part:
                    yield Place(place, weight, "out", 1)


@torch.no_grad()
def evidence(found: list[Place], budget: float) -> Evidence:
    """What a learner may know of the weights of `places`.

    Args:
        found: the weights; their `part_gradients` were collected.
        budget: how many active entries may be lost.

    Raises:
        UserError: they were not, since no forward pass called the layer.
    """
    active, values, gradients = [], [], []
    for place in found:
        matrix, parts = place.weight.matrix(), place.weight.part_gradients
        if parts is None:
            wanted = "gradients of parts of a batch, which a layer has where it is called"
            why = "its weight is read, as by nn.MultiheadAttention, or it was not used"
            raise UserError(f"permutation: expected {wanted}; of {place.name} {why}")
        mask = torch.zeros(matrix.numel() + 1, dtype=torch.bool, device=matrix.device)
        mask[place.weight.entries().flatten()] = True
        active.append(place.table(mask[:-1].view(matrix.shape)))
        values.append(place.table(matrix))
        gradients.append(place.table(parts * len(parts)))
    return Evidence(
        side=found[0].side,
        active=torch.cat(active),
        values=torch.cat(values),
        gradients=torch.cat(gradients, dim=1),
        budget=budget,
    )
