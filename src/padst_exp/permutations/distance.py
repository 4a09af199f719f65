"""Distance of a permutation to the identity, modulo the symmetries of a structure."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from padst_exp.pools import Symmetry


def distance_to_identity(index: Tensor, symmetry: Symmetry) -> float:
    """Return the least share of features to move for `index` to become one of the symmetries.

    0 for a permutation that the structure cannot see, such as one inside blocks, of whole blocks
    or, for cyclic diagonals, a shift; always 0 where all features are alike (unstructured).

    Args:
        index: `[d]`, int64, a permutation.
        symmetry: of the structure, on the side that is permuted.
    """
    labels = symmetry.labels.cpu()
    moved = labels[index.cpu()]
    num = int(labels.max()) + 1
    if symmetry.step is not None:
        shifts = torch.bincount((moved - labels) % num, minlength=num)[:: symmetry.step]
        return 1 - int(shifts.max()) / len(index)
    overlap = torch.bincount(labels * num + moved, minlength=num * num).view(num, num)
    kinds = torch.zeros(num, dtype=torch.int64) if symmetry.kinds is None else symmetry.kinds.cpu()
    alike = torch.stack([kinds, labels.bincount()], 1).unique(dim=0, return_inverse=True)[1]
    # What may not pair counts nothing: the others then pair as well as they can.
    overlap = overlap.where(alike[:, None] == alike, 0)
    rows, columns = linear_sum_assignment(overlap.numpy(), maximize=True)
    return 1 - int(overlap[rows, columns].sum()) / len(index)
