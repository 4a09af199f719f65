import math
import unittest.mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dst_cases import rigl, set_algorithm
from padst_exp import pools
from padst_exp.dst import Change, Cubic, DropGrow, Sigmoid, Signals, Static, Topology
from padst_exp.dst.counts import Shrinking
from padst_exp.errors import UserError
from padst_exp.pools import best_of_each
from padst_exp.structures import Geometry, Structure, random_units
from structure_cases import STRUCTURES, shapes


def signals(topology: Topology, seed: int, progress: float = 0.0) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    return Signals(
        magnitude=torch.rand(len(topology.active), generator=generator),
        dense_gradient=torch.rand(topology.num_pools, topology.pool_size, generator=generator),
        generator=generator,
        progress=progress,
    )


def table(geometry: Geometry, structure: Structure, start: float) -> Topology:
    """A fresh topology of density `start` that is to end at 0.25."""
    counts = structure.initial_counts(geometry, start)
    active = random_units(geometry, counts, torch.Generator().manual_seed(0))
    target = structure.initial_counts(geometry, 0.25)
    return Topology(
        active, geometry.candidates, geometry.unit_sizes, geometry.pool_size, geometry.shape, target
    )


def one_pool(num_active: int, candidates: int) -> Topology:
    """The first `num_active` units of one pool of single entries."""
    one = torch.ones(1, dtype=torch.int64)
    shape, active = (1, candidates), torch.arange(num_active)
    return Topology(active, one * candidates, one, candidates, shape, one * num_active)


def legal(topology: Topology, change: Change) -> Topology:
    """The next topology; its units are sorted, distinct and exist."""
    assert change.source is None and change.row_order is None
    assert bool((change.active.diff() > 0).all())
    after = topology.with_active(change.active)
    assert bool(after.exists().flatten()[change.active].all())
    return after


def test_constant_counts_never_move() -> None:
    for algorithm in (rigl(interval=10, stop=0.75), set_algorithm(interval=10, stop=0.75)):
        for name, structure in STRUCTURES.items():
            for shape in shapes(name):
                topology = table(structure.geometry(*shape, 0.25), structure, 0.25)
                counts, carry = topology.counts(), 0.0
                for step in range(10, 70, 10):
                    change, carry = algorithm.decide(
                        topology, signals(topology, step), step=step, total=100, carry=carry
                    )
                    topology = legal(topology, change)
                    assert torch.equal(topology.counts(), counts), (name, shape)
                    assert 0 <= carry < 1


def test_shrinking_counts_fall_in_every_pool_and_end_at_the_target() -> None:
    schedules: list[Shrinking] = [
        Cubic(start=0.8, begin=0.1, end=0.6),
        Sigmoid(start=1.0, begin=0.0, end=0.75, steepness=6.0),
        Cubic(start=0.5, begin=0.5, end=0.75),
    ]
    for counts in schedules:
        algorithm = rigl(counts=counts, interval=10, stop=0.75)
        for name, structure in STRUCTURES.items():
            for shape in shapes(name):
                start = algorithm.initial_density(0.25)
                assert start == counts.start
                topology = table(structure.geometry(*shape, 0.25), structure, start)
                carry = 0.0
                # The last update is at `stop`, between two others.
                for step in (step for step in range(100) if algorithm.is_due(step, 100)):
                    before = topology.counts()
                    shrinks = not torch.equal(before, topology.target)
                    assert algorithm.can_change(topology) or not shrinks
                    change, carry = algorithm.decide(
                        topology, signals(topology, step), step=step, total=100, carry=carry
                    )
                    topology = legal(topology, change)
                    most = before.maximum(topology.target)
                    assert bool((topology.counts() <= most).all()), (name, shape, step)
                    assert bool((topology.counts() >= topology.target).all()), (name, shape)
                assert torch.equal(topology.counts(), topology.target), (name, shape)


def test_shrinking_follows_its_curve() -> None:
    topology = one_pool(1000, 1000)
    target = torch.tensor([100])
    topology = Topology(
        topology.active, topology.candidates, topology.unit_sizes, 1000, (10, 100), target
    )
    cubic = Cubic(start=1.0, begin=0.2, end=0.8)
    sigmoid = Sigmoid(start=1.0, begin=0.2, end=0.8, steepness=6.0)
    for progress in (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0):
        share = min(max((progress - 0.2) / 0.6, 0), 1)
        assert int(cubic(topology, progress)) == round(100 + 900 * (1 - share) ** 3)
        low, high = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
        left = (1 / (1 + math.exp(6 * (share - 0.5))) - low) / (high - low)
        assert abs(int(sigmoid(topology, progress)) - (100 + 900 * left)) <= 0.5 + 1e-6
    assert int(cubic(topology.with_active(torch.arange(300)), 0.0)) == 300, "never back up"
    assert cubic.initial_density(0.1) == 1.0
    assert Cubic(start=0.3, begin=0.0, end=1.0).initial_density(0.5) == 0.5


def update(
    weight: list[float], gradient: list[float], fraction: float, algorithm: DropGrow | None = None
) -> list[int]:
    """Eight slots, the first `len(weight)` of them active, one pool, step 0."""
    algorithm = algorithm or rigl(fraction=fraction)
    given = Signals(
        magnitude=torch.tensor(weight), dense_gradient=torch.tensor([gradient]).float(),
        generator=torch.Generator(), progress=0.0,
    )  # fmt: skip
    topology = one_pool(len(weight), 8)
    return algorithm.decide(topology, given, step=0, total=100, carry=0.0)[0].active.tolist()


def test_the_smallest_leave_and_the_steepest_come() -> None:
    assert update([3.0, 1.0, 2.0, 4.0], [0, 0, 0, 0, 1, 5, 3, 2], 0.5) == [0, 3, 5, 6]


def test_a_dropped_unit_may_return() -> None:
    assert update([3.0, 1.0, 2.0, 4.0], [0, 9, 0, 0, 1, 5, 3, 2], 0.5) == [0, 1, 3, 5]


def test_ties_go_to_the_lower_index() -> None:
    assert update([1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0, 7, 7, 7, 7], 0.5) == [2, 3, 4, 5]


def test_drops_are_global_but_refills_local() -> None:
    four = torch.tensor([4, 4])
    ones = torch.ones(2, dtype=torch.int64)
    topology = Topology(torch.tensor([0, 1, 4, 5]), four, ones, 4, (2, 4), torch.tensor([2, 2]))
    given = Signals(
        magnitude=torch.tensor([0.1, 0.2, 3.0, 4.0]),
        dense_gradient=torch.tensor([[0.0, 0, 1, 2], [0, 0, 90, 80]]),
        generator=torch.Generator(),
        progress=0.0,
    )
    change, _ = rigl(fraction=0.5).decide(topology, given, step=0, total=100, carry=0.0)
    # Both losses fall on pool 0, so pool 1 gains nothing, however steep its gradients.
    assert change.active.tolist() == [2, 3, 4, 5]


def test_a_carry_lets_small_layers_change_in_time() -> None:
    topology, slow = one_pool(4, 100), set_algorithm(fraction=0.2)
    carry, grown = 0.0, 0
    expected = sum(slow.drop_fraction(step, 100) * 4 for step in range(1, 11))
    for step in range(1, 11):
        change, carry = slow.decide(
            topology, signals(topology, step), step=step, total=100, carry=carry
        )
        grown += len(set(change.active.tolist()) - set(topology.active.tolist()))
        topology = legal(topology, change)
    # A unit that returns at once counts as a drop but not as grown; of 96 that is rare.
    assert math.floor(expected) - 1 <= grown <= math.floor(expected)


def test_random_growth_depends_on_the_generator_only() -> None:
    topology = one_pool(20, 100)
    first, second, other = (
        set_algorithm().decide(topology, signals(topology, seed), step=10, total=100, carry=0.0)[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.active, second.active)
    assert not torch.equal(first.active, other.active)


def test_the_fraction_falls_along_a_cosine_until_updates_stop() -> None:
    algorithm = rigl(interval=10, stop=0.75)
    assert algorithm.drop_fraction(0, 100) == pytest.approx(0.6)
    assert algorithm.drop_fraction(37.5, 100) == pytest.approx(0.3)  # type: ignore[arg-type]
    assert algorithm.drop_fraction(75, 100) == pytest.approx(0.0)
    due = [step for step in range(101) if algorithm.is_due(step, 100)]
    assert due == [10, 20, 30, 40, 50, 60, 70]
    assert not any(rigl(interval=10, stop=0.0).is_due(step, 100) for step in range(101))


def test_static_keeps_everything() -> None:
    topology, static = one_pool(5, 9), Static()
    assert not any(static.is_due(step, 100) for step in range(101))
    assert not static.can_change(topology)
    change, carry = static.decide(topology, signals(topology, 0), step=5, total=10, carry=0.5)
    assert torch.equal(change.active, topology.active) and carry == 0.5


def test_no_units_or_all_of_them_leave_nothing_to_decide() -> None:
    for active, candidates, wanted in [(0, 100, False), (1, 100, True), (100, 100, False)]:
        assert rigl().can_change(one_pool(active, candidates)) == wanted


def test_the_needs_of_an_algorithm_are_those_of_its_scores() -> None:
    assert rigl().needs == {"dense_gradient"} and set_algorithm().needs == frozenset()


@given(
    scores=st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_best_of_each_pool_are_those_of_a_stable_sort(
    scores: list[list[int]], seed: int
) -> None:
    table = torch.tensor(scores).float()
    k = torch.randint(0, 10, (len(scores),), generator=torch.Generator().manual_seed(seed))
    order = table.sort(dim=1, descending=True, stable=True).indices
    for short in (0, pools.SHORT_ROW):  # rows that are sorted and rows that are not
        with unittest.mock.patch.object(pools, "SHORT_ROW", short):
            marked, alike = best_of_each(table, k), best_of_each(table, int(k[0]))
        for row, number in enumerate(k.tolist()):
            assert torch.equal(marked[row].nonzero().squeeze(1), order[row, :number].sort().values)
        assert torch.equal(alike[0], marked[0])


def test_no_fewer_than_asked_are_the_best_where_scores_are_no_numbers() -> None:
    nan, low = torch.nan, -torch.inf
    table = torch.tensor([[nan, 2.0, nan, 1.0, low], [low, nan, torch.inf, low, nan]])
    for short in (0, pools.SHORT_ROW):
        with unittest.mock.patch.object(pools, "SHORT_ROW", short):
            two, three = best_of_each(table, 2), best_of_each(table, torch.tensor([3, 3]))
        assert two.nonzero()[:, 1].tolist() == [1, 3, 1, 2]
        assert three.nonzero()[:, 1].tolist() == [0, 1, 3, 1, 2, 4]


def test_bad_hyper_parameters_name_their_key() -> None:
    for key, value in [
        ("fraction", -0.1), ("fraction", 1.5), ("stop", -0.1), ("stop", 1.1), ("interval", 0),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"^dst\.{key}: expected [^\n]*, got {value}$"):
            rigl(**{key: value})
    good = {"start": 1.0, "begin": 0.1, "end": 0.6, "steepness": 6.0}
    for key, value in [
        ("start", 0.0), ("start", 1.5), ("begin", 1.0), ("end", 0.1), ("end", 1.5),
        ("steepness", 0.0),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=rf"^dst\.counts\.{key}: expected [^\n]*, got {value}$"):
            Sigmoid(**good | {key: value})
