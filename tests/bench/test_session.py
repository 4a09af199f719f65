import math

import torch

from bench.bench_cases import CPU, session
from padst_exp.bench import timing
from padst_exp.bench.session import EVERY, Contender
from padst_exp.bench.timing import Call, Timer


class Scripted(Timer):
    """For which a call takes as many milliseconds as it returns."""

    def seconds(self, call: Call, repeats: int = 1) -> float:
        value = call()
        return value / 1e3 if isinstance(value, float) else 1e-3

    def part(self, share: float) -> Timer:
        return self


class Passing(Timer):
    """With ten seconds, of which every look takes one."""

    looks = 0

    @property
    def left(self) -> float:
        self.looks += 1
        return 10.0 - self.looks


def test_calls_take_turns_and_bursts_follow_a_call_that_is_not_timed() -> None:
    called: list[str] = []
    calls: dict[str, Call] = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    timer = Scripted(CPU, "wall")
    samples, failed = timer.alternate(calls, rounds=4, passes={"b": 10})
    # Two calls of each to find out whether and how long they run; then one untimed and one timed.
    assert called == [*"aabb", *["a", "a", "b", "b"] * 4] and failed == {}
    assert samples == {"a": [1e-3] * 4, "b": [1e-4] * 4}


def test_what_cannot_run_is_named_and_others_go_on() -> None:
    def fails() -> None:
        raise NotImplementedError("no such\nkernel")

    timer = Timer(CPU, "cpu")
    samples, failed = timer.alternate({"bad": fails, "good": lambda: None}, rounds=1)
    assert failed == {"bad": "NotImplementedError: no such kernel"} and list(samples) == ["good"]
    # Without a GPU nothing can be captured.
    assert list(timer.alternate({"graph": timing.captured(fails, 2)}, rounds=1)[1]) == ["graph"]


def test_budgets_end_rounds_and_cells() -> None:
    spent = Timer(CPU, "wall", 0.0)
    samples, failed = spent.alternate({"a": lambda: None, "b": lambda: None}, rounds=50)
    assert len(samples["a"]) == timing.MIN_ROUNDS and failed == {"b": "no time left"}
    assert Timer(CPU, "wall").part(0.5).left == math.inf
    assert 4 < Timer(CPU, "wall", 10.0).part(0.5).left <= 5
    said: list[str] = []
    own = session(said, timer=Passing(CPU, "wall", 10.0))
    assert list(own.affordable("layers", range(20))) == list(range(9))
    assert said == ["layers: budget spent, 11 of 20 left out"]


def contender(milliseconds: float, kind: str, form: str) -> tuple[Contender, Call]:
    structure = "dense" if kind != "sparse" else "nm group=16"
    modules = [torch.nn.Identity()]
    one = Contender(structure=structure, form=form, kind=kind, modules=modules)  # type: ignore[arg-type]
    return one, lambda: milliseconds


def test_ratios_are_to_the_faster_dense_contender_and_to_the_fastest_of_all() -> None:
    sides = [contender(4.0, "dense", "eager"), contender(5.0, "dense", "compiled"),
             contender(2.0, "strong", "oneDNN"), contender(1.0, "sparse", "packed, native"),
             contender(8.0, "sparse", "packed, scatter")]  # fmt: skip
    own = session(timer=Scripted(CPU, "wall"))
    rows = {row["form"]: row for row in own.compare({}, sides, floor=lambda one, _: 5e-4)}
    fast, slow = rows["packed, native"], rows["packed, scatter"]
    assert (fast["dense_form"], fast["ratio"], fast["dense_ms"]) == ("eager", 4.0, 4.0)
    assert (fast["strongest_form"], fast["ratio_strongest"]) == ("oneDNN", 2.0)
    assert (fast["p50_ms"], fast["floor_ms"], fast["floor_share"]) == (1.0, 0.5, 0.5)
    assert (slow["ratio"], rows["oneDNN"]["ratio"], rows["eager"]["ratio"]) == (0.5, 2.0, 1.0)


def test_kernels_that_did_not_pass_stand_in_the_table_without_a_time() -> None:
    sides = [contender(4.0, "dense", "eager"), contender(1.0, "sparse", "packed, native")]
    kernel = "nm group=16", "packed, native"
    for verdicts, note in (
        ({kernel: "y: error 0.5 of 1e-06"}, "y: error 0.5 of 1e-06"),
        ({("nm group=16", "packed, torch"): ""}, "was not checked"),
        ({kernel: "", ("nm group=16", EVERY): "died"}, "died"),
        ({kernel: ""}, ""),
    ):
        dense, sparse = session(verdicts=verdicts).compare({}, sides)
        assert dense["p50_ms"] != "" and sparse["note"] == note
        assert (sparse["p50_ms"] == "") == bool(note) and (sparse["ratio"] == "") == bool(note)
