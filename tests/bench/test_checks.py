from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.bench_cases import CPU, session, settings
from padst_exp.bench import checks, gpu_all, layers, roofline, sides
from padst_exp.bench.configurations import Shape, structure
from padst_exp.bench.gpu_all import Part, Plan
from padst_exp.dispatch import decision

FLOAT = [torch.float32]
SHAPES = [Shape(20, 35), Shape(35, 20)]


def found(
    name: str, dtypes: list[torch.dtype] = FLOAT, density: float = 0.25
) -> list[checks.Check]:
    """All checks of one structure on odd shapes, or even ones for diagonals in classes."""
    shapes = [Shape(32, 48)] if name.startswith("diag-stride") else SHAPES
    return list(checks.run([structure(name)], shapes, [5], dtypes, CPU, density))


@pytest.mark.parametrize("name", ["nm-16", "block-8", "diag-stride-4"])
def test_tiles_pass_in_the_interpreter(name: str) -> None:
    results = found(name)
    assert all(result.passed for result in results), [r for r in results if not r.passed]
    kinds = {(result.kernel, result.what.partition(",")[0]) for result in results}
    assert {(kernel, what) for kernel in ("packed, triton", "features, triton")
            for what in ("forward", "dX", "dW")} <= kinds  # fmt: skip
    what = " ".join(result.what for result in results)
    assert all(word in what for word in ("permuted", "bias", "gelu", "residual", "norm"))


@pytest.mark.parametrize("name", ["nm-1", "unstructured", "diag-1"])
def test_single_entries_pass(name: str) -> None:
    results = found(name, [torch.float32, torch.bfloat16] if name != "diag-1" else FLOAT)
    assert all(result.passed for result in results), [r for r in results if not r.passed]
    kernels = {result.kernel for result in results}
    assert {"condensed", "fan_in", "packed, scattered"} <= kernels
    assert ("packed, triton" in kernels) == (name == "diag-1")


@pytest.mark.parametrize(
    ("wrong", "kept"),
    [(lambda y: y * 1.001, 0), (lambda y: y * torch.nan, 0), (lambda y: y, 1)],
)
def test_wrong_results_fail(monkeypatch: pytest.MonkeyPatch, wrong: object, kept: int) -> None:
    right = checks.fan_in_linear
    monkeypatch.setattr(checks, "fan_in_linear", lambda x, w: wrong(right(x, w)))  # type: ignore[operator]
    condensed = [result for result in found("unstructured") if result.kernel == "condensed"]
    assert condensed and all(result.passed == bool(kept) for result in condensed)


def test_kernels_that_do_not_run_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor, weight: object) -> Tensor:
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(checks, "fan_in_linear", broken)
    results = [result for result in found("unstructured") if result.kernel == "condensed"]
    assert {result.note for result in results} == {"RuntimeError: no kernel image"}
    assert not any(result.passed for result in results)
    reasons = checks.refused(results, torch.float32)
    assert set(reasons) == {
        ("condensed", "unstructured", False),
        ("condensed", "unstructured", True),
    }
    assert checks.refused(results, torch.bfloat16) == {}


def test_a_failed_gradient_refuses_the_backward_row_alone() -> None:
    bad = checks.Check("packed, triton", "nm group=64", "dX, 5 tokens", "float32", 1.0, 1e-3)
    assert list(checks.refused([bad], torch.float32)) == [("packed, triton", "nm group=64", True)]
    good = replace(bad, error=1e-4)
    assert checks.refused([good], torch.float32) == {}


def test_everything_is_checked_then_timed_and_what_failed_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole of gpu_all on a CPU, but for the models."""
    right = checks.fan_in_linear
    monkeypatch.setattr(checks, "fan_in_linear", lambda x, w: right(x, w) + 1)
    monkeypatch.setattr(sides, "rotation", lambda size, device: 2)
    monkeypatch.setattr(roofline, "rotation", lambda size, device: 2)
    monkeypatch.setattr(decision, "cache_folder", lambda: tmp_path)
    names = ("nm-16", "unstructured")
    monkeypatch.setattr(gpu_all, "PARTS", [Part("layers", layers.run, 1.0, {})])
    asked = settings("gpu_all")
    asked.structures = list(names)
    said: list[str] = []
    found = gpu_all.run(asked, session(said), Plan([Shape(20, 35)], [5], 0.25))
    results = {suite: [row for case in cases for row in case] for suite, cases in found}
    assert list(results) == ["checks", "layers"]
    assert {row["passed"] for row in results["checks"]} == {True, False}
    assert any("checks passed" in line for line in said)
    condensed = [row for row in results["layers"] if row["form"] == "condensed"]
    assert condensed and all(row["p50_ms"] == "" for row in condensed)
    assert all(str(row["note"]).startswith("failed its check: forward") for row in condensed)
    others = [row for row in results["layers"] if row["form"] == "packed, torch"]
    assert others and all(row["p50_ms"] > 0 for row in others)
