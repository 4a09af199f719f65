from typing import Any

import pytest

from from_yaml import from_yaml, leaf
from padst_exp.analysis.planted import Outcome, learn_planted, mean_error
from padst_exp.structures import Structure

# Measured: mean error of a learned permutation over that of a fixed random one, five seeds.
STRUCTURES: dict[str, tuple[Structure, float]] = {
    "block": (from_yaml("structure/block", size=8), 0.6),
    "diagonal": (from_yaml("structure/diag", bundle=1), 0.75),
    "shared N:M": (from_yaml("structure/nm", group=16), 0.6),
}


def student(structure: Structure, name: str, *, seed: int, **changes: Any) -> Outcome:
    settings = {"side": "in", **changes}
    keys = leaf(f"permutation/{name}")
    if "interval" in keys:
        settings = {"interval": 10, **settings}
    return learn_planted(
        structure,
        from_yaml(f"permutation/{name}", **settings),
        algorithm=from_yaml("dst/rigl", interval=10),
        optimizer=from_yaml("optimizer/adamw", lr=0.1, weight_decay=0.0),
        trainer=from_yaml("trainer/default", steps=400, batch_size=256),
        seed=seed,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_learned_permutation_beats_a_random_one(name: str) -> None:
    structure, share = STRUCTURES[name]
    found = [student(structure, "doubly_stochastic", seed=seed) for seed in range(5)]
    random = [student(structure, "random", seed=seed) for seed in range(5)]
    assert all(o.hardened is not None and o.hardened[0] == "delta" for o in found)
    assert mean_error(found) <= share * mean_error(random)
