"""Which rows of a weight share their inputs: given, random, learned, or solved anew at updates."""

from itertools import pairwise

import hydra
import pytest
import torch

from dst.small_training import Training, start
from from_yaml import from_yaml, leaf
from padst_exp.config import config_dir
from padst_exp.layers import SparseLinear, permutations, sparse_weights
from padst_exp.soft import soft_choices

STEPS, GROUP = 16, 8
GIVEN, RANDOM, LEARNED, SOLVED = "none", "random", "doubly_stochastic", "moves"


def training(permutation: str, structure: str = "fan_in", dst: str = "rigl") -> Training:
    quick = {"deadline": 0.6, "every": 1, "interval": 2, "significance": 0.0}
    keys = leaf(f"permutation/{permutation}")
    learner = from_yaml(
        f"permutation/{permutation}", **{k: v for k, v in quick.items() if k in keys}
    )
    size = {"group": GROUP} if structure == "fan_in" else {"size": GROUP}
    return start(
        from_yaml(f"dst/{dst}", interval=2, fraction=0.5),
        from_yaml(f"structure/{structure}", **size),
        steps=STEPS, density=0.25, learner=learner,
    )  # fmt: skip


def groups(layer: SparseLinear) -> set[frozenset[int]]:
    """The rows of the layer that read the same inputs, as many as a group has."""
    kept = layer.weight.detach() != 0
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for row, pattern in enumerate(kept.tolist()):
        patterns.setdefault(tuple(pattern), []).append(row)
    return {frozenset(rows) for rows in patterns.values()}


def runs_of(number: int) -> set[frozenset[int]]:
    return {frozenset(range(at, at + GROUP)) for at in range(0, number, GROUP)}


def fill(run: Training) -> None:
    """No active entry is zero, so that patterns show."""
    for weight in sparse_weights(run.model).values():
        weight.values.data.fill_(1.0)


@pytest.mark.parametrize("permutation", [GIVEN, RANDOM, LEARNED, SOLVED])
def test_rows_are_grouped_as_the_option_says(permutation: str) -> None:
    run = training(permutation)
    before = {name: p.nearest().clone() for name, p in permutations(run.model).items()}
    assert bool(before) == (permutation != GIVEN)
    # Of groups of rows that read any inputs, only the order of rows means anything.
    assert all("output_permutations" in name for name in before)
    run.run(STEPS)
    assert not soft_choices(run.model)
    fill(run)
    for name in ("0", "2"):
        layer = run.model.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        found, natural = groups(layer), runs_of(layer.out_features)
        assert all(len(rows) % GROUP == 0 for rows in found)
        if permutation == GIVEN:
            assert found == natural
            continue
        assert found != natural
        # Feature i is row index[i] of the weight, whose runs of rows are the groups.
        (hard,) = [p for (side, _), p in layer.permutations().items() if side == "out"]
        expected = {frozenset((hard.index // GROUP == g).nonzero().flatten().tolist())
                    for g in range(layer.out_features // GROUP)}  # fmt: skip
        assert expected == found
    changed = [not torch.equal(before[n], p.index) for n, p in permutations(run.model).items()]
    assert any(changed) == (permutation in (LEARNED, SOLVED))


def test_blocks_of_any_rows_are_cut_anew_at_updates() -> None:
    """The other way to solve for rows: `structure=shuffled_block dst=dsb`."""
    run = training(GIVEN, "shuffled_block", "dsb")
    orders: list[list[int]] = []

    def look(training: Training) -> None:
        order = next(iter(sparse_weights(training.model).values())).row_order
        orders.append([] if order is None else order.tolist())

    run.run(STEPS, after=look)
    assert sum(one != other for one, other in pairwise(orders)) >= 2


def test_one_experiment_sweeps_all_four() -> None:
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose("config", ["experiment=row_groups"], return_hydra_config=True)
    assert cfg.structure._target_.endswith("FanIn") and cfg.structure.group == 16
    options = cfg.hydra.sweeper.params.permutation.split(",")
    assert options == [GIVEN, RANDOM, LEARNED, SOLVED]
