from dataclasses import replace

import torch

from bench.bench_cases import session
from padst_exp.bench import timing
from padst_exp.bench.timing import (
    Budget,
    Clock,
    alternate,
    captured,
    fastest,
    quantiles,
    ratio,
    usable,
)

CLOCK = Clock(torch.device("cpu"), "wall")


def test_sides_alternate_and_bursts_follow_a_call_that_is_not_timed() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    samples = alternate(calls, CLOCK, rounds=4, block=0.0, budget=Budget(None))
    # Two calls of each to find out how long they take, then one untimed and one timed a round.
    assert called == [*"aabb", *["a", "a", "b", "b"] * 4]
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 4, "b": 4}


def test_a_spent_budget_leaves_the_fewest_rounds() -> None:
    samples = alternate({"a": lambda: None}, CLOCK, rounds=50, block=0.0, budget=Budget(0.0))
    assert len(samples["a"]) == timing.MIN_ROUNDS


class TenSeconds(Clock):
    """For which every call takes ten seconds."""

    def seconds(self, call: timing.Call, repeats: int = 1) -> float:
        return 10.0


def test_one_call_may_make_several_passes() -> None:
    calls = {"one": lambda: None, "ten": lambda: None}
    clock = TenSeconds(torch.device("cpu"), "wall")
    samples = alternate(calls, clock, rounds=2, block=0.0, budget=Budget(None), passes={"ten": 10})
    assert samples == {"one": [10.0, 10.0], "ten": [1.0, 1.0]}


def test_quantiles_are_milliseconds_and_ratios_those_of_neighbours() -> None:
    assert quantiles([0.001, 0.002, 0.003, 0.004, 0.005, 0.006]) == (2.0, 3.5, 5.0)
    # The machine slowed down by ten for both sides in the second round.
    assert ratio([4.0, 40.0, 4.0], [2.0, 20.0, 2.0]) == (2.0, 2.0, 2.0)
    assert fastest({"a": [3.0, 3.0], "b": [1.0, 9.0], "c": [2.0, 2.0]}, ["a", "b"]) == "a"


def test_what_cannot_run_is_named() -> None:
    def fails() -> None:
        raise NotImplementedError("no such\nkernel")

    waited: list[bool] = []
    calls = {"good": lambda: None, "bad": fails}
    ran, failed = usable(calls, lambda: waited.append(True), Budget(None))
    assert list(ran) == ["good"] and waited == [True]
    assert failed == {"bad": "NotImplementedError: no such kernel"}


def test_a_part_of_the_time_is_kept_for_what_can_run() -> None:
    calls = {"first": lambda: None, "second": lambda: None}
    ran, failed = usable(calls, lambda: None, Budget(0.0))
    assert list(ran) == ["first"] and failed == {"second": "no time left"}
    # The reserve is of what a cell has: a late one is timed as completely as the first.
    late = replace(session(), budget=Late(100.0))
    samples, failed = late.alternate(calls, rounds=1)
    assert list(samples) == ["first", "second"] and not failed
    assert not Budget(None).is_below(0.9)
    assert Budget(100.0).is_below(1.0) and not Budget(100.0).is_below(0.9)


def test_a_capture_that_fails_is_named() -> None:
    def fails() -> None:
        raise ValueError("cannot be captured")

    _, failed = usable({"graph": captured(fails, torch.device("cuda"))}, lambda: None, Budget(None))
    assert list(failed) == ["graph"] and failed["graph"]


class Late(Budget):
    """Of which a tenth is left."""

    @property
    def left(self) -> float:
        return 0.1 * self.seconds


class Passing(Budget):
    """Of ten seconds, of which every look takes one."""

    looks = 0

    @property
    def left(self) -> float:
        self.looks += 1
        return 10.0 - self.looks


def test_cells_are_opened_while_there_is_time() -> None:
    said: list[str] = []
    own = replace(session(said), budget=Passing(10.0))
    assert list(own.affordable("layers", range(20))) == list(range(9))
    assert said == ["layers: budget spent, 11 of 20 cells left"]
    assert list(session().affordable("layers", range(20))) == list(range(20))


def test_budgets_share_what_is_left() -> None:
    assert 4 < Budget(10).part(0.5).left <= 5
    assert Budget(None).part(0.5).left == float("inf")
