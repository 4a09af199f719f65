"""Permutations of features and the learners that create and train them."""

from padst_exp.permutations.distance import distance_to_identity
from padst_exp.permutations.exchange import Evidence, Exchange
from padst_exp.permutations.fitting import Greedy, Search
from padst_exp.permutations.givens import Givens, TurningPermutation
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
from padst_exp.permutations.moves import Moves
from padst_exp.permutations.permutation import Permutation, is_bijection
from padst_exp.permutations.placebos import (
    DrawnTarget,
    RandomTarget,
    Shuffled,
    ShuffledPermutation,
)
from padst_exp.permutations.site import Site
from padst_exp.permutations.straight_through import HeldPermutation, StraightThrough
from padst_exp.permutations.transport import Partition, Transport

__all__ = [
    "DoublyStochastic",
    "DrawnPermutation",
    "DrawnTarget",
    "Evidence",
    "Exchange",
    "Givens",
    "Greedy",
    "Grouped",
    "GroupedPermutation",
    "GumbelSinkhorn",
    "HeldPermutation",
    "Kaleidoscope",
    "Moves",
    "NoPermutation",
    "Partition",
    "Permutation",
    "PermutationLearner",
    "RandomPermutation",
    "RandomTarget",
    "Relaxed",
    "Search",
    "Shuffled",
    "ShuffledPermutation",
    "Site",
    "StraightThrough",
    "SwitchedPermutation",
    "Transport",
    "TurningPermutation",
    "distance_to_identity",
    "is_bijection",
]
