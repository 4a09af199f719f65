"""Permutations of features and the learners that create and train them."""

from padst_exp.permutations.distance import partition_distance, shift_distance
from padst_exp.permutations.grouped import Grouped, GroupedPermutation
from padst_exp.permutations.gumbel_sinkhorn import DrawnPermutation, GumbelSinkhorn
from padst_exp.permutations.kaleidoscope import Kaleidoscope, SwitchedPermutation
from padst_exp.permutations.learners import (
    DoublyStochastic,
    NoPermutation,
    PermutationLearner,
    RandomPermutation,
    Relaxed,
)
from padst_exp.permutations.permutation import Permutation, is_bijection
from padst_exp.permutations.site import Site

__all__ = [
    "DoublyStochastic",
    "DrawnPermutation",
    "Grouped",
    "GroupedPermutation",
    "GumbelSinkhorn",
    "Kaleidoscope",
    "NoPermutation",
    "Permutation",
    "PermutationLearner",
    "RandomPermutation",
    "Relaxed",
    "Site",
    "SwitchedPermutation",
    "is_bijection",
    "partition_distance",
    "shift_distance",
]
