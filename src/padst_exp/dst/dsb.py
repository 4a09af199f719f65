"""DSB: RigL on single entries, then blocks again, of rows and columns chosen anew."""

from __future__ import annotations

import math

import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor

from padst_exp.dst.algorithm import Periodic
from padst_exp.dst.topology import Change, Signals, Topology


class DSB(Periodic):
    """Dynamic shuffled blocks (Jiang et al. 2022), with real blocks for every layer.

    An update drops the smallest single weights and grows as many where the gradient is largest,
    as RigL does. A drop inside a block is vetoed unless half of the block's row, or of its column,
    goes too. Then the weight is cut anew: rows whose patterns are alike form groups; each group
    orders its columns by the norm of their weights (a grown one counts as a mean one) and cuts
    them into blocks; the blocks of largest norm stay.

    Args:
        fraction, interval, stop, moments: see `Periodic`. The paper stops at half of RigL's share.
    """

    needs = frozenset({"dense_gradient", "entries"})
    requires = frozenset({"shuffled_blocks"})
    resizes = False

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        assert signals.entries is not None
        entries = signals.entries
        weights, active = entries.weights.abs(), entries.active
        height = int(topology.unit_sizes[0])

        wanted = self.drop_fraction(step, total) * int(active.sum()) + carry
        num_drop = max(0, min(math.floor(wanted), int(active.sum()) - 1))
        dropped = _mark(-weights.masked_fill(~active, torch.inf), num_drop)
        order = entries.row_order
        kept = active.clone()
        kept[order] = active[order] & ~_agreed(dropped[order], active[order], height)
        num_grow = int((active & ~kept).sum())
        grown = _mark(entries.gradients.abs().masked_fill(kept, -torch.inf), num_grow)
        weights = torch.where(kept, weights, grown * weights[kept].mean())

        order = similar_rows(kept | grown).to(weights.device)
        chosen = _blocks(weights[order], topology, height)
        return Change(chosen, row_order=order), wanted - num_drop


def similar_rows(mask: Tensor) -> Tensor:
    """An order of rows, int64 `[O]`, in which neighbours have like patterns `mask` `[O, I]`.

    That of the leaves of an agglomerative clustering by complete linkage of cosine distances.
    """
    if len(mask) == 1:
        return torch.zeros(1, dtype=torch.int64)
    rows = mask.cpu().double()
    lengths = rows.norm(dim=1)
    cosines = (rows @ rows.T) / (lengths[:, None] * lengths).clamp_min(1)
    upper = torch.triu_indices(len(rows), len(rows), 1)
    # An empty row is like no other; what rounding leaves of a distance of zero would make an order.
    distances = (1 - cosines[upper[0], upper[1]]).clamp(min=0).round(decimals=12)
    leaves = leaves_list(linkage(distances.numpy(), "complete"))
    return torch.from_numpy(leaves.astype("int64"))


def _mark(scores: Tensor, number: int) -> Tensor:
    """Bool `[O, I]`, the `number` highest of all `scores`, ties to the lower row and column."""
    order = scores.flatten().sort(descending=True, stable=True).indices
    marked = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    marked[order[:number]] = True
    return marked.view(scores.shape)


def _agreed(dropped: Tensor, active: Tensor, height: int) -> Tensor:
    """Which drops `[O, I]` stand: half of the row or of the column of their block goes too.

    Rows are in the order of their groups. A group's blocks are runs of its active columns.
    """
    agreed = torch.zeros_like(dropped)
    for start in range(0, len(dropped), height):
        group = slice(start, start + height)
        columns = active[group].any(0).nonzero().squeeze(1)
        for block in columns.split(height):
            drops = dropped[group][:, block]
            enough = drops.shape[1] / 2, drops.shape[0] / 2
            by_row, by_column = drops.sum(1) >= enough[0], drops.sum(0) >= enough[1]
            agreed[start : start + len(drops), block] = drops & (by_row[:, None] | by_column)
    return agreed


def _blocks(weights: Tensor, topology: Topology, height: int) -> Tensor:
    """Ids of the units that stay, sorted: whole blocks of the largest norms, as many as before.

    Args:
        weights: `[O, I]`, rows in the order of their groups, zero where nothing is to be.
        topology: for the counts.
        height: rows of a group, and columns of a block.
    """
    num_columns = weights.shape[1]
    groups = weights.square().split(height)
    energy = torch.stack([group.sum(0) for group in groups])
    ranked = energy.sort(dim=1, descending=True, stable=True)
    starts = range(0, num_columns, height)
    norms = torch.stack([ranked.values[:, at : at + height].sum(1) for at in starts], 1)
    chosen = []
    group_of = torch.arange(len(groups), device=weights.device) * num_columns
    pools = group_of // topology.pool_size
    for pool, count in enumerate(topology.target.tolist()):
        own = (pools == pool).nonzero().squeeze(1)
        best = norms[own].flatten().sort(descending=True, stable=True).indices
        left = count
        for block in best.tolist():
            group, at = own[block // len(starts)], (block % len(starts)) * height
            units = ranked.indices[group, at : at + height][:left] + group_of[group]
            chosen.append(units)
            left -= len(units)
            if not left:
                break
    return torch.cat(chosen).sort().values
