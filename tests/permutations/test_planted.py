import pytest
from tests.permutations.planted import learn_planted, mean_error

from padst_exp.permutations import DoublyStochastic, RandomPermutation
from padst_exp.structures import NM, Block, Diagonal, Structure

# Measured: learned over random .43, .62, .31 (five seeds).
STRUCTURES = {
    "block": (Block(size=8, balanced=False), 0.6),
    "diagonal": (Diagonal(bundle=1, stride=1, width=1), 0.7),
    "shared N:M": (NM(n=1, m=None, group=16), 0.6),
}


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "share"), STRUCTURES.values(), ids=STRUCTURES)
def test_learned_permutation_beats_a_random_one(structure: Structure, share: float) -> None:
    learned = [learn_planted(structure, DoublyStochastic(), seed=seed) for seed in range(5)]
    random = [learn_planted(structure, RandomPermutation(), seed=seed) for seed in range(5)]
    assert all(o.hardened is not None and o.hardened[0] == "delta" for o in learned)
    assert mean_error(learned) <= share * mean_error(random)
