from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from bench.bench_cases import run
from padst_exp.bench.payoff import WIDTH, Measured, break_even, question_of
from padst_exp.config import config_dir
from padst_exp.errors import UserError

NM = {"_target_": "padst_exp.structures.NM", "n": 1, "m": None, "group": 16}


def question(**changes: Any) -> Any:
    cfg: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "bench.yaml"))
    cfg = {key: value for key, value in cfg.items() if key not in ("defaults", "hydra")}
    asked = {"shape": "48x32", "tokens": 3, "structure": NM, "device": "cpu"}
    return question_of({**cfg, **asked, **changes}, "structure=nm")


def test_one_layer_is_answered_in_a_few_lines_and_no_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    status = run(
        ["shape=48x32", "tokens=3", "structure=nm", "structure.group=8", "sparsity=0.75",
         "device=cpu", "rounds=1", "clock=cpu"],
        monkeypatch,
    )  # fmt: skip
    said = capsys.readouterr().err
    assert status == 0, said
    _, about, *lines = said.splitlines()
    assert about.startswith("48->32, 3 tokens, structure=nm structure.group=8, permutation folded")
    assert "1 thread(s), float32, cpu time" in about
    assert [line.partition(": ")[0] for line in lines] == ["forward"] * 2 + ["forward+backward"] * 2
    for times, even in (lines[:2], lines[2:]):
        assert "dense" in times and "75.0% sparse" in times and "times as fast (quartiles" in times
        assert "break-even between " in even or "as fast as dense at " in even
    assert {path for path in tmp_path.iterdir() if path.name != "decisions"} == before


def test_mistakes_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "shape=48x32"
    for arguments, message in (
        ([shape, "tokens=3", "structure=nn"], "structure=nn: unknown option"),
        ([shape, "tokens=3", "structure=nm", "structure.grup=1"], "structure.grup: unknown key"),
        ([shape, "tokens=3", "structure=nm", "structure.n=2", "structure.m=4", "device=cpu"],
         "structure.m: 2:4 means sparsity 0.5, but sparsity is 0.9"),
        (["suite=layers", "structure=nm"], "structure: expected none beside suite"),
        (["structure=nm", "tokens=3"], "suite: expected layers, fan_in, "),
    ):  # fmt: skip
        assert run(arguments, monkeypatch) == 1, arguments
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"padst_exp: error: {message}"), line
    wanted = "shape: expected inputs x outputs of a linear layer, such as 3072x768, got "
    for changes, message in (
        ({"shape": 768}, f"{wanted}768"),
        ({"shape": "0x768"}, f"{wanted}0x768"),
        ({"shape": "768x768x3"}, f"{wanted}768x768x3"),
        ({"shape": "999999999x999999999"}, "shape: expected what fits into "),
        ({"tokens": None}, "tokens: expected one number of at least 1, got None"),
        ({"tokens": [1, 8]}, "tokens: expected one number of at least 1, got [1, 8]"),
        ({"tokens": 10**12}, "tokens: expected what fits into "),
        ({"sparsity": 1.0}, "sparsity: expected a number in [0, 1), got 1.0"),
        ({"sparsity": "much"}, "sparsity: expected a number in [0, 1), got much"),
        ({"structure": None}, "structure: expected one of block, "),
        ({"structure": {"_target_": "padst_exp.structures.Dense"}}, "structure: expected one of "),
        ({"suite": "layers"}, "suite: expected null beside shape"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
    ):
        with pytest.raises(UserError) as error:
            question(**changes)
        assert str(error.value).startswith(message), error.value
    assert (question().sparsity, question(sparsity=0.5).sparsity) == (0.9, 0.5)


def test_a_break_even_is_a_bracket_of_what_was_measured() -> None:
    for threshold in (0.02, 0.31, 0.9, 0.95, 0.99):
        seen: dict[float, Measured] = {}

        def at(sparsity: float, threshold: float = threshold, seen: Any = seen) -> Measured:
            # One over the time of a layer that takes as long as a dense one at the threshold.
            seen[sparsity] = Measured(sparsity, {"ratio": (1 - threshold) / (1 - sparsity)})
            return seen[sparsity]

        told = break_even(at(0.9), at)
        low = max((s for s in seen if seen[s].ratio < 1), default=0.0)
        high = min((s for s in seen if seen[s].ratio >= 1), default=1.0)
        assert low < threshold <= high and high - low <= WIDTH
        if low == 0:
            assert told == f"as fast as dense at all that were measured, down to {seen[high]}"
        elif high == 1:
            assert told == f"as fast as dense at none that was measured, up to {seen[low]}"
        else:
            assert told == f"break-even between {seen[low]} and {seen[high]}"
        assert len(seen) <= 8

    def refuses(sparsity: float) -> Measured:
        raise UserError("sparsity: 2:4 means 0.5")

    only = Measured(0.5, {"ratio": 1.6})
    assert break_even(only, refuses) == (
        "as fast as dense at all that were measured, down to 50.0% (1.6 times as fast)"
    )
