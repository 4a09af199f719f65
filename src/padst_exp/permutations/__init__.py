"""Permutations of features and the learners that create and train them."""

from padst_exp.permutations.distance import partition_distance, shift_distance
from padst_exp.permutations.learners import (
    DoublyStochastic,
    Learner,
    NoPermutation,
    RandomPermutation,
)
from padst_exp.permutations.permutation import Permutation

__all__ = [
    "DoublyStochastic",
    "Learner",
    "NoPermutation",
    "Permutation",
    "RandomPermutation",
    "partition_distance",
    "shift_distance",
]
