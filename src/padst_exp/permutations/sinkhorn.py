"""Doubly stochastic matrices: two ways to make one, and the penalty that sharpens it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Return the doubly stochastic matrix `[d, d]` that Sinkhorn reaches from `exp(logits)`.

    Columns sum to one, rows up to what the iterations leave. Differentiable (one matrix: once),
    through all iterations. To be called without autocast.

    Args:
        logits: `[d, d]`, or `[G, d, d]` for G small ones, float32 or float64; -inf for what must
            stay zero.
        iterations: rounds of row then column normalisation, at least 1.
    """
    if logits.dim() == 3:
        for _ in range(iterations - 1):
            logits = logits.log_softmax(2).log_softmax(1)
        return logits.log_softmax(2).softmax(1)
    # After one round in log space every row and column sums to at least 1/d, so that nothing can
    # under- or overflow any more, and the other rounds only rescale: two products each with a
    # vector instead of two passes of exponentials.
    return _Rescale.apply(logits.log_softmax(1).softmax(0), iterations - 1)


class _Rescale(torch.autograd.Function):
    """M = diag(r) B diag(c), where r = 1 / (B c) and c = 1 / (B' r) in turn, from c = 1.

    By hand because autograd would add one `[d, d]` outer product per vector to the gradient of B;
    two matrix products do for all of them: twice as fast.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, iterations: int) -> Tensor:
        row = base.new_ones(len(base))
        column = base.new_ones(len(base))
        rows, columns = [row], [column]
        for _ in range(iterations):
            row = base.mv(column).reciprocal_()
            column = base.mT.mv(row).reciprocal_()
            rows.append(row)
            columns.append(column)
        ctx.save_for_backward(base, torch.stack(rows), torch.stack(columns))
        return base * row[:, None] * column

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        base, rows, columns = ctx.saved_tensors
        last = len(rows) - 1
        with torch.autocast(base.device.type, enabled=False):
            grad_base = grad * rows[last][:, None] * columns[last]
            if last == 0:
                return grad_base, None
            through = grad * base
            grad_row: Tensor | int = through.mv(columns[last])
            grad_column = through.mT.mv(rows[last])
            row_slope, column_slope = -rows.square(), -columns.square()
            from_rows, from_columns = [], []  # gradients of B c and of B' r, last round first
            for i in range(last, 0, -1):
                from_columns.append(grad_column * column_slope[i])
                from_rows.append((grad_row + base.mv(from_columns[-1])) * row_slope[i])
                grad_column = base.mT.mv(from_rows[-1])
                grad_row = 0  # only the last scales reach M directly
            grad_base = grad_base.addmm(rows[1:].flip(0).mT, torch.stack(from_columns))
            grad_base = grad_base.addmm(torch.stack(from_rows).mT, columns[:-1].flip(0))
        return grad_base, None


def project(matrix: Tensor, iterations: int) -> Tensor:
    """Return `matrix` `[d, d]` clamped at zero, its rows and columns normalised alternately.

    A row or column without any mass restarts from uniform. Not meant to be differentiated.
    """
    matrix = matrix.clamp_min(0)
    for _ in range(iterations):
        for dim in (1, 0):
            total = matrix.sum(dim, keepdim=True)
            matrix = torch.where(total > 0, matrix / total, 1 / len(matrix))
    return matrix


def sharpness_penalty(matrix: Tensor) -> Tensor:
    """Return how far the doubly stochastic `matrix` `[d, d]` is from a permutation, a scalar.

    The sum over rows and columns of (l1 - l2) (AutoShuffleNet, PA-DST), divided by its value at
    the uniform matrix, 2d(1 - 1/sqrt(d)): 1 at uniform, 0 at a permutation. No entry is negative,
    so that l1 is the sum, whose gradient shrinks the zeros of the projected form too.
    """
    size = len(matrix)
    l2 = matrix.norm(dim=0).sum() + matrix.norm(dim=1).sum()
    return (2 * matrix.sum() - l2) / (2 * size * (1 - 1 / math.sqrt(size)))
