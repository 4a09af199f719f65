"""SRigL: constant fan-in with neuron ablation (Lasby et al. 2024)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from padst_exp.dst.algorithm import Periodic
from padst_exp.dst.topology import Change, Signals, Topology
from padst_exp.errors import require
from padst_exp.pools import best_of_each


class SRigL(Periodic):
    """RigL under constant fan-in: a pool is a neuron, or a group of neurons that share inputs.

    An update counts for each neuron its salient units: the largest `n_keep` weights and the
    largest `n_drop` gradients of the whole layer. Neurons with fewer than `gamma` times the fan-in
    they would have without any ablation are ablated; the survivors share the budget, so their
    fan-in rises. Ablation is decided afresh each time, so that neurons may return. Kept are the
    largest weights, at most the new fan-in of each neuron, then each neuron grows where its
    gradient is largest.

    Args:
        gamma: share of the un-ablated fan-in that must be salient; 0.3, for ViTs 0.95.
        ablation: whether neurons may be ablated at all.
        fraction, interval, stop, moments: see `Periodic`.
    """

    needs = frozenset({"dense_gradient"})
    requires = frozenset({"neurons"})

    def __init__(
        self,
        *,
        gamma: float,
        ablation: bool,
        fraction: float,
        interval: int,
        stop: float,
        moments: Literal["age", "zero"],
    ) -> None:
        super().__init__(fraction=fraction, interval=interval, stop=stop, moments=moments)
        require(0 <= gamma <= 1, "dst.gamma", gamma, "a share of the fan-in in [0, 1]")
        self.gamma = gamma
        self.ablation = ablation
        self.silences_rows = ablation

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        assert signals.dense_gradient is not None
        num_active = len(topology.active)
        wanted = self.drop_fraction(step, total) * num_active + carry
        num_drop = max(0, min(math.floor(wanted), num_active))
        # A weight that was just grown and is still zero is nothing to keep.
        num_keep = min(num_active - num_drop, int((signals.magnitude > 0).sum()))

        shape = topology.num_pools, topology.pool_size
        weights = signals.magnitude.new_full(shape, -torch.inf)
        weights.view(-1)[topology.active] = signals.magnitude
        gradients = signals.dense_gradient.masked_fill(~topology.exists(), -torch.inf)
        kept, grown = _largest(weights, num_keep), _largest(gradients, num_drop)
        alive = self._alive(topology, (kept | grown).sum(1))
        fan_in = min(int(topology.target.sum()) // int(alive.sum()), topology.pool_size)

        kept = _largest(weights.masked_fill(~alive[:, None], -torch.inf), num_keep)
        per_row = kept.sum(1).clamp(max=fan_in)
        kept = best_of_each(weights.masked_fill(~kept, -torch.inf), per_row)
        missing = torch.where(alive, fan_in - per_row, 0)
        active = kept | best_of_each(gradients.masked_fill(kept, -torch.inf), missing)
        return Change(active.flatten().nonzero().squeeze(1)), wanted - num_drop

    def _alive(self, topology: Topology, salient: Tensor) -> Tensor:
        """Which pools stay, bool `[P]`, given how many salient units each has."""
        if not self.ablation or topology.is_output:
            return torch.ones_like(salient, dtype=torch.bool)
        budget = int(topology.target.sum())
        fan_in = budget // topology.num_pools
        # 0.57 * 100 is a little less than 57.
        threshold = max(1, int(self.gamma * fan_in + 1e-9))
        # So many must stay that none gets more inputs than there are.
        fewest = -(-budget // topology.pool_size)
        ranked = salient.sort(descending=True, stable=True).values
        return salient >= min(threshold, int(ranked[fewest - 1]))


def _largest(scores: Tensor, number: int) -> Tensor:
    """Bool `[P, Q]`, the `number` largest of all scores, -inf never among them."""
    number = min(number, int((scores > -torch.inf).sum()))
    return best_of_each(scores.view(1, -1), torch.tensor([number]).to(scores.device)).view(
        scores.shape
    )
