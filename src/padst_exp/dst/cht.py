"""Cannistraci-Hebb training: links grow where paths of length 3 are, whatever the gradient says.

A weight is a bipartite graph: its rows and columns (of units, where these are larger than one
entry) are nodes, its active units links. Letters: A the adjacency `[R, C]`, 1 where a unit is
active; u a row, v a column, without a link between them; z1 a column and z2 a row on a path
u - z1 - z2 - v.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from padst_exp.dst.scores import DropScore, GrowScore
from padst_exp.dst.topology import Signals, Topology
from padst_exp.errors import require


class SoftMagnitude(DropScore):
    """Which units stay is drawn, with odds |w|^T (CHTs, Zhang et al. 2025).

    T rises from `start` to `end` over the training: first nearly anything may leave, later the
    smallest do.

    Args:
        start: T at the beginning.
        end: T at the end.
        relative: in place of |w|, its share of all |w| of its row plus that of its column.
    """

    def __init__(self, *, start: float, end: float, relative: bool) -> None:
        require(start >= 0, "dst.drop.start", start, "at least 0 (any unit may leave)")
        require(end >= start, "dst.drop.end", end, f"at least dst.drop.start={start}")
        require(end <= 1000, "dst.drop.end", end, "at most 1000 (the smallest leave for certain)")
        self.start = start
        self.end = end
        self.relative = relative
        if relative:
            self.needs, self.requires = frozenset({"coordinates"}), frozenset({"grid"})

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        weight = signals.magnitude
        if self.relative:
            rows, columns, (num_rows, num_columns) = _nodes(signals)
            row, column = rows[topology.active], columns[topology.active]
            row_sums = weight.new_zeros(num_rows).index_add(0, row, weight)
            column_sums = weight.new_zeros(num_columns).index_add(0, column, weight)
            smallest = torch.finfo(weight.dtype).tiny
            weight = weight / row_sums[row].clamp_min(smallest)
            weight = weight + signals.magnitude / column_sums[column].clamp_min(smallest)
        power = self.start + (self.end - self.start) * signals.progress
        return power * _logarithm(weight) + _gumbel(weight, signals.generator)


class PathScore(GrowScore):
    """A score of absent links by the paths of length 3 that they would close.

    What no path leads to comes last, in random order.

    Args:
        soft: whether to draw with odds in proportion to the scores; else the highest come.
    """

    needs = frozenset({"coordinates"})
    requires = frozenset({"grid"})

    def __init__(self, *, soft: bool) -> None:
        self.soft = soft

    @abc.abstractmethod
    def paths(self, adjacency: Tensor) -> Tensor:
        """Scores `[R, C]` of `adjacency` `[R, C]` (0 or 1); those of links mean nothing."""

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        rows, columns, shape = _nodes(signals)
        active = topology.active
        # At least float32, whatever the weights are: degrees are counted in it.
        adjacency = torch.zeros(shape, device=active.device)
        adjacency[rows[active], columns[active]] = 1
        scores = self.paths(adjacency)[rows.clamp(min=0), columns.clamp(min=0)]
        chance = _gumbel(scores, signals.generator)
        # Far below any score, yet near enough to 0 for float32 to tell chances apart.
        last = chance - 100
        drawn = _logarithm(scores) + chance if self.soft else scores
        return torch.where(scores > 0, drawn, last).view(topology.num_pools, topology.pool_size)


class CH3L3(PathScore):
    """CH3-L3p: the sum over paths of 1 / sqrt((1 + e(z1)) (1 + e(z2))) (CHT, Zhang et al. 2024).

    e(z) counts the links of z that lead out of the local community of (u, v): neither to u or v,
    nor to another node on a path between them. Costs links * R * C operations, so it is for small
    layers.
    """

    def paths(self, adjacency: Tensor) -> Tensor:
        row_degree, column_degree = adjacency.sum(1), adjacency.sum(0)
        # A column z1 shares these many rows with v: they are all in the community, as u is not.
        # So 1 + e(z1) is its degree less those.
        shared_columns = (column_degree[:, None] - adjacency.T @ adjacency).clamp(min=1).rsqrt()
        shared_rows = (row_degree[:, None] - adjacency @ adjacency.T).clamp(min=1).rsqrt()
        scores = torch.zeros_like(adjacency)
        for row, links in enumerate(adjacency.bool()):
            through = adjacency[:, links] @ shared_columns[links]
            scores[row] = (through * adjacency * shared_rows[:, row, None]).sum(0)
        return scores


class CH2L3(PathScore):
    """CH2-L3n, in matrix form: R A + A R', what CHTs uses on large layers (Zhang et al. 2025).

    R `[R, R]` is (D + 1) / (E + 1) where D = A A^T has common links, else 0, with E the links of
    the second node that are not common; R' the same of columns.
    """

    def paths(self, adjacency: Tensor) -> Tensor:
        return _common(adjacency) @ adjacency + adjacency @ _common(adjacency.T).T


def _common(adjacency: Tensor) -> Tensor:
    common = adjacency @ adjacency.T
    external = (adjacency.sum(1) - common).clamp(min=1) - 1
    return torch.where(common > 0, (common + 1) / (external + 1), 0)


def _nodes(signals: Signals) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The row and column node of each unit id, int64 `[P * Q]` (-1: no unit), and their numbers."""
    assert signals.coordinates is not None
    nodes, numbers = [], []
    for places in signals.coordinates.unbind(1):
        names, node = places.unique(return_inverse=True)
        absent = int(names[0] < 0)
        nodes.append(node - absent)
        numbers.append(len(names) - absent)
    return nodes[0], nodes[1], (numbers[0], numbers[1])


def _logarithm(values: Tensor) -> Tensor:
    """Finite also at 0: -inf means that something must not be chosen."""
    return values.clamp_min(torch.finfo(values.dtype).tiny).log()


def _gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise that turns a choice of the largest logarithms into a draw without replacement."""
    chance = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    smallest = torch.finfo(torch.float64).tiny
    return -(-chance.clamp_min(smallest).log()).clamp_min(smallest).log().to(like)
