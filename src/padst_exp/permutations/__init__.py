"""Permutations of features and the learners that create and train them."""

from padst_exp.permutations.distance import distance_to_identity
from padst_exp.permutations.exchange import Evidence, Exchange
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
from padst_exp.permutations.straight_through import HeldPermutation, StraightThrough

__all__ = [
    "DoublyStochastic",
    "DrawnPermutation",
    "Evidence",
    "Exchange",
    "Grouped",
    "GroupedPermutation",
    "GumbelSinkhorn",
    "HeldPermutation",
    "Kaleidoscope",
    "NoPermutation",
    "Permutation",
    "PermutationLearner",
    "RandomPermutation",
    "Relaxed",
    "Site",
    "StraightThrough",
    "SwitchedPermutation",
    "distance_to_identity",
    "is_bijection",
]
