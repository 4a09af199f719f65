"""Distance of a permutation to the identity, modulo the symmetries of a structure."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def partition_distance(index: Tensor, labels: Tensor) -> float:
    """Return the least share of inputs to move for `index` to map whole classes to classes.

    0 for a permutation that the structure cannot see, such as one inside blocks or of whole
    blocks; always 0 when all inputs are interchangeable (unstructured, fan-in).

    Args:
        index: `[d]`, int64, a permutation.
        labels: `[d]`, int64: class of each input; inputs of a class are interchangeable.
    """
    _, classes = labels.cpu().unique(return_inverse=True)
    num = int(classes.max()) + 1
    overlap = torch.bincount(classes * num + classes[index.cpu()], minlength=num * num)
    overlap = overlap.view(num, num)
    rows, columns = linear_sum_assignment(overlap.numpy(), maximize=True)
    return 1 - int(overlap[rows, columns].sum()) / len(index)


def shift_distance(index: Tensor) -> float:
    """Return the share of inputs that `index` `[d]` moves, up to the best cyclic shift.

    Cyclic shifts are the symmetries of a set of cyclic diagonals.
    """
    size = len(index)
    shift = (index.cpu() - torch.arange(size)) % size
    return 1 - int(shift.bincount().max()) / size
