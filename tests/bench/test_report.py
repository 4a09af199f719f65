import csv
import sys
from pathlib import Path

import pytest

from bench.bench_cases import session
from padst_exp.bench import __main__ as command
from padst_exp.bench import environment, plots, readme, report, roofline, sides
from padst_exp.bench.report import Line, timing_rows
from padst_exp.dispatch import decision


def rows(suite: str = "layers", **changes: object) -> list[report.Row]:
    """Dense in two forms, oneDNN, and two sparse sides, one of them slow."""
    common = {"case": "32->48", "tokens": 5, "what": "forward", "scope": "all", **changes}
    lines = {
        "dense, eager": Line(structure="dense", form="eager", side="dense", **common),
        "dense, compiled": Line(structure="dense", form="compiled", side="dense", **common),
        "dense, oneDNN": Line(structure="dense", form="oneDNN", side="strong", **common),
        "fast": Line(structure="nm group=16", form="packed, torch", density_asked=0.1,
                     density=0.1, dispatcher="torch", floor=1e-4, **common),
        "slow": Line(structure="unstructured", form="packed, scattered", density_asked=0.1,
                     density=0.1, dispatcher="dense", **common),
        "gone": Line(structure="block size=8", form="packed, triton", density_asked=0.1,
                     density=0.1, **common),
    }  # fmt: skip
    samples = {
        "dense, eager": [4e-3, 4.4e-3, 4e-3],
        "dense, compiled": [5e-3] * 3,
        "dense, oneDNN": [2e-3] * 3,
        "fast": [1e-3, 1.1e-3, 1e-3],
        "slow": [8e-3] * 3,
        "bytes twin": [1e-4] * 3,
    }
    return timing_rows(session(), suite, lines, samples, {"gone": "failed its check: forward"})


def test_ratios_are_to_the_faster_dense_side_and_to_the_fastest_of_all() -> None:
    by_form = {(row["structure"], row["form"]): row for row in rows()}
    fast = by_form["nm group=16", "packed, torch"]
    assert (fast["dense_form"], fast["ratio"]) == ("dense, eager", 4.0)
    assert (fast["strongest_form"], fast["ratio_strongest"]) == ("dense, oneDNN", 2.0)
    assert (fast["p50_ms"], fast["floor_share"], fast["rounds"]) == (1.0, 0.1, 3)
    slow = by_form["unstructured", "packed, scattered"]
    assert (slow["ratio"], slow["dispatcher"]) == (0.5, "dense")
    gone = by_form["block size=8", "packed, triton"]
    assert (gone["p50_ms"], gone["ratio"], gone["note"]) == ("", "", "failed its check: forward")


@pytest.mark.parametrize("suite", ["layers", "model_inference"])
def test_tables_are_written_read_and_drawn(suite: str, tmp_path: Path) -> None:
    path = tmp_path / f"{suite}-cpu-float32.csv"
    report.write_csv(path, rows(suite))
    read = report.read_csv(path)
    assert [row["ratio"] for row in read] == [str(row["ratio"]) for row in rows(suite)]
    picture = plots.draw(suite, read, path.with_suffix(".png"))
    assert picture is not None and picture.read_bytes().startswith(b"\x89PNG")
    text = readme.write(tmp_path).read_text()
    assert f"{suite}-cpu-float32.png" in text
    # Above 1 against both dense sides; below 1, which stands there with the dispatcher's choice.
    assert "4.00 / 2.00" in text and "0.50 / 0.25" in text
    assert "failed its check" in text and "not measured at this configuration" in text
    if suite == "layers":
        slow = "| unstructured, packed, scattered | 0.1 | forward | 1 of 1; tokens 5: 32->48 | 0.5"
        assert f"{slow} | dense |" in text
        assert "| nm group=16, packed, torch | 4 |" in text


def test_memory_and_checks_are_tables_too(tmp_path: Path) -> None:
    side = {
        "suite": "memory", "case": "tiny", "batch": 2, "structure": "dense", "scope": "",
        "permutation": "none", "density_asked": 1, "density": 1, "parameters_bytes": 4e6,
        "gradients_bytes": 4e6, "moments_bytes": 8e6, "indices_bytes": 0, "peak_bytes": 30e6,
        "kept_share": 1, "peak_share": 1, "accuracy": "", **session().environment,
    }  # fmt: skip
    side = {key: int(v) if isinstance(v, float) else v for key, v in side.items()}
    report.write_csv(tmp_path / "memory-cpu-float32.csv", [side])
    path = tmp_path / "memory-cpu-float32.png"
    assert plots.draw("memory", report.read_csv(path.with_suffix(".csv")), path) == path
    check = {"suite": "checks", "kernel": "fan_in", "structure": "nm group=1", "what": "dX",
             "dtype": "float32", "error": 1e-7, "limit": 1e-6, "note": "", "passed": True,
             **session().environment}  # fmt: skip
    report.write_csv(tmp_path / "checks-gpu-float32.csv", [check])
    assert plots.draw("checks", [], tmp_path / "none.png") is None
    text = readme.write(tmp_path).read_text()
    assert "4.0 | 4.0 | 8.0 | 0.0 | 30.0" in text and "1 of 1 | dX: 1e-07 of 1e-06" in text


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    try:
        command.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0


def test_the_command_measures_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (sides, roofline):
        monkeypatch.setattr(module, "rotation", lambda size, device: 2)
    monkeypatch.setattr(roofline, "last_level_cache", lambda device: 1 << 16)
    monkeypatch.setitem(roofline.GEMM, "cpu", 64)
    monkeypatch.setattr(decision, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(environment, "device_name", lambda device: "AMD EPYC (2 of them)")
    out = tmp_path / "kernels"
    status = run(
        ["suite=layers", "device=cpu", "shapes=[48x32]", "tokens=[3]", "sparsities=[0.75]",
         "structures=[nm-16]", "rounds=1", f"out={out}"], monkeypatch,
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "layers-amd-epyc-2-of-them-float32.csv",
        "layers-amd-epyc-2-of-them-float32.png",
    ]  # fmt: skip
    with (out / "layers-amd-epyc-2-of-them-float32.csv").open() as file:
        read = list(csv.DictReader(file))
    assert {row["structure"] for row in read} == {"dense", "nm group=16"}
    assert all(row["threads"] == "1" and row["clock"] == "wall" for row in read)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["suite=layer"], "suite: expected layers or model_inference or "),
        (["suite=layers", "structures=[nn-3]"], "structures: 'nn-3' is unknown; expected nm-64"),
        (["suite=layers", "shapes=[vit_x]"], "shapes: 'vit_x' is unknown, expected 3072x768; did "),
        (["suite=memory", "models=[vitt]"], "models: 'vitt' is unknown; did you mean vit?"),
        (["suite=layers", "rounds=0"], "rounds: expected at least 1, got 0"),
        (["suite=layers", "tokens=[1,0]"], "tokens: expected at least 1, got 0"),
        (["suite=layers", "sparsities=[1.0]"], "sparsities: expected a number in [0, 1), got 1.0"),
        (["suite=layers", "scopes=[some]"], "scopes: expected all or dense_qkv, got 'some'"),
        (["suite=layers", "threads=2", "clock=cpu"], "clock: cpu counts the time of one thread"),
        (["suite=layers", "budget=0"], "budget: expected seconds, got 0"),
        (["suite=layers", "budget=nan"], "budget: expected seconds, got nan"),
        (["suite=gpu_all", "device=cpu"], "suite: gpu_all needs a GPU, and "),
        ([], "suite: missing, expected layers or model_inference or "),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(roofline, "last_level_cache", lambda device: 1 << 16)
    monkeypatch.setitem(roofline.GEMM, "cpu", 64)
    assert run(arguments, monkeypatch) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"padst_exp: error: {message}"), line
