import sys
from pathlib import Path

import pytest

from padst_exp.report import __main__ as command
from padst_exp.report.plan import plan
from programs import exit_status
from report.made import made

SMALL = ("structure=nm", "permutation=none", "trainer.steps=1000", "trainer.batch_size=100")
KERNELS = Path(__file__).parents[2] / "results" / "kernels"


def test_hours_come_from_the_same_run_or_from_throughput(tmp_path: Path) -> None:
    runs = f"runs={tmp_path}"
    # 12 seconds, and 500 samples a second, are what `made` writes.
    made(tmp_path, "earlier", 50.0, overrides=SMALL)
    lines = list(plan([*SMALL, "seed=1,2,3", runs], tmp_path))
    assert lines[0] == "runs: 3, 3 seeds of 1 configuration"
    assert lines[1] == "time: 36 seconds on cpu, 1 thread(s) for 3 runs, one after another"
    assert lines[2] == "  3 runs by earlier, the same but for its seed"
    assert lines[3] == "memory: up to 944 MB a run, by the peak of earlier (cpu, 1 thread(s))"
    assert lines[4].startswith("disk: ") and "for 3 runs" in lines[4] and len(lines) == 5
    # Twice as long and another algorithm: 2,000 steps of 100 samples at 500 a second.
    longer = list(plan([*SMALL[:2], "dst=set", "trainer.steps=2000", SMALL[3], runs], tmp_path))
    assert longer[1].startswith("time: 7 minutes on cpu") and "500 samples/s" in longer[2]


def test_nothing_is_invented(tmp_path: Path) -> None:
    made(tmp_path, "earlier", 50.0, overrides=SMALL)
    other = [*SMALL[:1], "permutation=random", *SMALL[2:], f"runs={tmp_path}"]
    for overrides in (other, [*SMALL, "runs=nowhere"], ["experiment=row_groups", "scale=demo"]):
        first, *rest = plan(overrides, tmp_path)
        assert first.startswith("runs: ")
        assert rest[0] == "no measurement of time, memory, disk for any of them"


def test_tables_of_whole_models_are_measurements_too(tmp_path: Path) -> None:
    paper = ["dataset=imagenet1k", "structure=nm", "structure.group=64", f"runs={tmp_path}"]
    lines = list(plan([*paper, "permutation=none"], KERNELS))
    # 300 epochs of 1,281,167 images, 16 of which take the milliseconds of the table.
    hours = 300 * 1_281_167 / 16 * 3.28 / 3600
    assert lines[1].startswith(f"time: {hours:,.1f} hours on AMD EPYC, float32, 1 thread(s)")
    assert "3280 ms a training step of 16 samples" in lines[2]
    assert "at batch 16 on AMD EPYC" in lines[3]
    soft = list(plan([*paper, "permutation=doubly_stochastic"], KERNELS))
    assert "permutations soft" in soft[2]
    smaller = list(plan([*paper, "permutation=none", "model.dim=384"], KERNELS))
    assert smaller[1].startswith("no measurement of time")


def test_the_command_plans_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def status(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["report", "plan", *arguments])
        return exit_status(command.main)

    assert status("experiment=row_groups", "scale=demo", "seed=range(2)") == 0
    assert "2 seeds of" in capsys.readouterr().err and not list(tmp_path.iterdir())
    for wrong, message, code in (
        ("experiment=nothing", "experiment=nothing: unknown option", 1),
        ("trainer.steps=many", "trainer.steps: expected", 1),
        ("trainer.stepss=1", "trainer.stepss: unknown key", 1),
        ("seed=[1", "seed=[1", 2),
    ):
        assert status(wrong) == code, wrong
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"padst_exp: error: {message}"), line
