"""Permutations of features and the learners that create and train them."""

from padst_exp.permutations.distance import partition_distance, shift_distance
from padst_exp.permutations.learners import (
    DoublyStochastic,
    NoPermutation,
    PermutationLearner,
    RandomPermutation,
)
from padst_exp.permutations.permutation import Permutation, is_bijection

__all__ = [
    "DoublyStochastic",
    "NoPermutation",
    "Permutation",
    "PermutationLearner",
    "RandomPermutation",
    "is_bijection",
    "partition_distance",
    "shift_distance",
]
