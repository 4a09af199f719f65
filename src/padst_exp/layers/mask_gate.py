"""A gate that a soft partition of features moves over a dense weight."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_exp.dst import Change, Gate
from padst_exp.dst.selection import Gated
from padst_exp.layers.exchange import Place, sources
from padst_exp.permutations import Partition
from padst_exp.structures import Geometry, best_units, gather_entries, scatter_entries

# Entries that no active unit covers keep the root of this, and with it a gradient.
FLOOR = 1e-3


class MaskGate(Gate):
    """Every value of a dense weight counts sqrt(D + FLOOR), D its share under active units.

    D = A Q, with A the mask of the active units over slots and Q of a `Partition`. The weight's
    columns (its rows on the output side) are features until it settles, slots from then on.

    Args:
        place: the weight, all of whose units are active, and the side of its features.
        partition: soft.
        kept: int64 `[K]`, the first active units, as many of each pool as are to stay.
    """

    copied = ("kept",)
    kept: Tensor

    def __init__(self, place: Place, partition: Partition, kept: Tensor) -> None:
        super().__init__(place.weight.topology())
        self.register_buffer("kept", kept.to(self.units.device))
        # In tuples, or they would become modules inside of this one.
        self._place, self._partition = (place,), (partition,)
        partition.on_look.append(self.choose)

    @property
    def soft(self) -> bool:
        return self._partition[0].soft

    def attach(self, weight: Gated) -> None:
        assert weight is self._place[0].weight

    def coefficients(self) -> Tensor:
        """`[N, E]`, differentiable in the logits of the partition."""
        return (self.shares() + FLOOR).sqrt()

    def shares(self) -> Tensor:
        """D of every value, `[N, E]`: 1 where all of its feature lies under active units."""
        place, partition = self._place[0], self._partition[0]
        weight = place.weight
        inside = torch.ones(len(self.kept), weight.geometry.unit_size, device=self.kept.device)
        entries = weight.geometry.entries(self.kept)
        mask = place.table(scatter_entries(inside, entries, weight.shape))
        quotas = partition.shares()
        # Slots of a group live and die together: any of them speaks for all.
        shares = place.matrix(mask[:, partition.members].to(quotas.dtype) @ quotas)
        return gather_entries(shares, weight.entries())

    @torch.no_grad()
    def choose(self) -> None:
        """Let those units be active under which most of the energy of the values lies now."""
        place, partition = self._place[0], self._partition[0]
        weight, geometry = place.weight, place.weight.geometry
        matrix = scatter_entries(weight.unweighed(), weight.entries(), weight.shape)
        quotas = partition.shares() / partition.sizes[:, None]
        energy = place.table(matrix.square()).to(quotas.dtype) @ quotas[partition.groups].T
        scores = geometry.unit_rms(place.matrix(energy).sqrt())
        self.kept.copy_(best_units(geometry, self.target.cpu(), scores))

    @torch.no_grad()
    def harden(self, choice: Tensor | None = None) -> None:
        # Its partition does; what it leaves is what counts last.
        return

    def settled(self) -> Change:
        place, index = self._place[0], self._partition[0].index
        origin = index if place.side == "in" else index.argsort()
        entries = place.weight.geometry.entries(self.kept)
        return Change(self.kept.clone(), source=sources(place, entries, origin))

    def taken_over(self) -> Tensor:
        return self.coefficients().detach()

    def penalty(self) -> Tensor:
        return torch.zeros((), device=self.units.device)

    def gain(self) -> Tensor:
        return torch.ones((), device=self.units.device)

    def nearest(self) -> Tensor:
        return self.kept.clone()


def tied(geometry: Geometry, place: Place) -> Tensor:
    """Groups of slots that always live and die together, int64 `[d]`, numbered from 0."""
    units = geometry.unit_ids()
    owners = units[:, None].expand(-1, geometry.unit_size).double() + 1
    owned = place.table(scatter_entries(owners, geometry.entries(units), geometry.shape))
    groups: Tensor = owned.unique(dim=1, return_inverse=True)[1]
    return groups


def move_mask(place: Place, partition: Partition, kept: Tensor) -> None:
    """Let `partition` move the mask of the units `kept` over a weight, all of which is active."""
    weight = place.weight
    if len(partition.groups.unique()) == partition.size:  # the first weight that it meets
        groups = tied(weight.geometry, place)
        if len(groups.unique()) < partition.size:
            partition.divide(groups, place.side)
    partition.side = place.side
    weight.select(MaskGate(place, partition, kept))
