"""Permutations of features and the learners that create and train them."""

from padst_exp.permutations.distance import distance_to_identity
from padst_exp.permutations.learners import (
    DoublyStochastic,
    NoPermutation,
    PermutationLearner,
    RandomPermutation,
)
from padst_exp.permutations.permutation import Permutation, is_bijection
from padst_exp.permutations.site import Site

__all__ = [
    "DoublyStochastic",
    "NoPermutation",
    "Permutation",
    "PermutationLearner",
    "RandomPermutation",
    "Site",
    "distance_to_identity",
    "is_bijection",
]
