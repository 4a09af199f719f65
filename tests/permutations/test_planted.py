import pytest

from padst_exp.permutations import RandomPermutation
from padst_exp.structures import NM, Block, Diagonal, Structure
from permutation_cases import learned
from permutations.planted import learn_planted, mean_error

# Measured: learned over random .43, .62, .31 (five seeds).
STRUCTURES: dict[str, tuple[Structure, float]] = {
    "block": (Block(size=8, balanced=False), 0.6),
    "diagonal": (Diagonal(bundle=1, stride=1, width=1), 0.7),
    "shared N:M": (NM(n=1, m=None, group=16), 0.6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_learned_permutation_beats_a_random_one(name: str) -> None:
    structure, share = STRUCTURES[name]
    found = [learn_planted(structure, learned(), seed=seed) for seed in range(5)]
    random = [learn_planted(structure, RandomPermutation(side="in"), seed=s) for s in range(5)]
    assert all(o.hardened is not None and o.hardened[0] == "delta" for o in found)
    assert mean_error(found) <= share * mean_error(random)
