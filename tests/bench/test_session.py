import pytest
import torch

from bench.bench_cases import CPU, session
from padst_exp.bench import session as measuring
from padst_exp.bench.session import Call, Contender, Timer, rotation


class Scripted(Timer):
    """For which a call takes as many milliseconds as it returns."""

    def seconds(self, call: Call, repeats: int = 1) -> float:
        value = call()
        return value / 1e3 if isinstance(value, float) else 1e-3


def test_calls_take_turns_and_bursts_follow_a_call_that_is_not_timed() -> None:
    called: list[str] = []
    calls: dict[str, Call] = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    samples, failed = Scripted(CPU, "wall").alternate(calls, rounds=4)
    # Two calls of each to find out whether and how long they run; then one untimed and one timed.
    assert called == [*"aabb", *["a", "a", "b", "b"] * 4] and failed == {}
    assert samples == {"a": [1e-3] * 4, "b": [1e-3] * 4}


def test_what_cannot_run_is_named_and_others_go_on() -> None:
    def fails() -> None:
        raise NotImplementedError("no such\nkernel")

    calls: dict[str, Call] = {"bad": fails, "good": lambda: None}
    samples, failed = Timer(CPU, "cpu").alternate(calls, rounds=1)
    assert failed == {"bad": "NotImplementedError: no such kernel"} and list(samples) == ["good"]


def contender(milliseconds: float, kind: str, form: str, passes: int = 1) -> tuple[Contender, Call]:
    structure = "dense" if kind != "sparse" else "nm group=16"
    modules = [torch.nn.Identity()]
    one = Contender(structure=structure, form=form, kind=kind, modules=modules,  # type: ignore[arg-type]
                    floor=5e-4, passes=passes)  # fmt: skip
    return one, lambda: milliseconds


def test_ratios_are_to_the_faster_dense_contender_and_to_the_fastest_of_all() -> None:
    sides = [contender(4.0, "dense", "eager"), contender(5.0, "dense", "compiled"),
             contender(2.0, "strong", "oneDNN"), contender(1.0, "sparse", "packed, native"),
             contender(16.0, "sparse", "packed, scatter", passes=2)]  # fmt: skip
    own = session(timer=Scripted(CPU, "wall"))
    rows = {row["form"]: row for _, row in own.compare({}, sides).iterrows()}
    fast, slow = rows["packed, native"], rows["packed, scatter"]
    assert (fast["dense_form"], fast["ratio"], fast["dense_ms"]) == ("eager", 4.0, 4.0)
    assert (fast["strongest_form"], fast["ratio_strongest"]) == ("oneDNN", 2.0)
    assert (fast["p50_ms"], fast["floor_ms"], fast["floor_share"]) == (1.0, 0.5, 0.5)
    assert (slow["ratio"], rows["oneDNN"]["ratio"], rows["eager"]["ratio"]) == (0.5, 2.0, 1.0)


def test_weights_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "last_level_cache", lambda device: 100)
    monkeypatch.setattr(measuring, "MAX_ROTATION", 50)
    assert [rotation(size, CPU) for size in (1, 10, 1000)] == [50, 25, 2]
