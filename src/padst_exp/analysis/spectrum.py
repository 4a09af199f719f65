"""Ramanujan metrics of the bipartite graph that a mask is.

Left nodes are the columns of a mask (inputs; of a convolution C * kh * kw), right nodes its rows,
edges its entries (Hoang et al., ICLR and NeurIPS 2023, as used by Sparse-IFT). The eigenvalues of
the graph are plus and minus the singular values of the matrix, so that its second largest
eigenvalue is the second singular value.

A permutation of rows or columns renames nodes: all of this is blind to it, see `paths`.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

# Graphs with fewer edges a node on average, and degrees with fewer nodes, are left out.
_LEAST = 3


@dataclass(frozen=True)
class Spectrum:
    """Ramanujan metrics of one weight; None where its graph is too thin.

    Args:
        gap: sqrt(d_L - 1) + sqrt(d_R - 1) - s_2 of the mask, d the mean degrees; a Ramanujan graph
            has none below 0. Random masks are above 0 too: compare with one of equal density.
        imdb: mean gap over the subgraphs of all left nodes of one degree.
        weighted_gap: s_1 - s_2 of the absolute weights.
        imsg: mean weighted gap over the same subgraphs.
        left_degree, right_degree: mean degrees of nodes that have an edge.
    """

    gap: float | None
    imdb: float | None
    weighted_gap: float
    imsg: float | None
    left_degree: float
    right_degree: float


def spectrum(mask: Tensor, weights: Tensor) -> Spectrum:
    """Metrics of one weight.

    Args:
        mask: bool `[O, I]`.
        weights: `[O, I]`, zero where the mask is.
    """
    absolute = weights.detach().abs().double() * mask
    degrees = mask.sum(0)
    gaps, weighted = [], []
    for degree in degrees[degrees > 0].unique().tolist():
        columns = degrees == degree
        if int(columns.sum()) < _LEAST:
            continue
        gap = _gap(mask[:, columns])
        if gap is not None:
            gaps.append(gap)
            weighted.append(_difference(absolute[:, columns]))
    left, right = _mean_degrees(mask)
    return Spectrum(
        gap=_gap(mask),
        imdb=statistics.fmean(gaps) if gaps else None,
        weighted_gap=_difference(absolute),
        imsg=statistics.fmean(weighted) if weighted else None,
        left_degree=left,
        right_degree=right,
    )


def top_two(matrix: Tensor) -> tuple[float, float]:
    """The two largest singular values of a matrix; of a vector the second is 0."""
    # The squares are eigenvalues of the smaller product, which is several times faster.
    wide = matrix.double() if len(matrix) <= matrix.shape[1] else matrix.double().t()
    squares = torch.linalg.eigvalsh(wide @ wide.t()).clamp(min=0)
    second = float(squares[-2].sqrt()) if len(squares) > 1 else 0.0
    return float(squares[-1].sqrt()), second


def _gap(mask: Tensor) -> float | None:
    left, right = _mean_degrees(mask)
    if min(left, right) < _LEAST:
        return None
    return math.sqrt(left - 1) + math.sqrt(right - 1) - top_two(mask)[1]


def _difference(absolute: Tensor) -> float:
    first, second = top_two(absolute)
    return first - second


def _mean_degrees(mask: Tensor) -> tuple[float, float]:
    """Mean degrees of left and right nodes; those without an edge are not there."""
    edges = int(mask.sum())
    left, right = int(mask.any(0).sum()), int(mask.any(1).sum())
    return edges / max(1, left), edges / max(1, right)
