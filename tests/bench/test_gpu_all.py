"""The whole of gpu_all on a CPU, but for the models."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.bench_cases import session, settings
from padst_exp.bench import gpu_all, layers, roofline, sides
from padst_exp.bench.check_case import Check
from padst_exp.bench.configurations import Shape, describe, structure
from padst_exp.bench.gpu_all import Part, Point, apart, checks_at
from padst_exp.bench.keys import BenchSchema
from padst_exp.bench.report import Row
from padst_exp.dispatch import decision
from padst_exp.structures import Structure

POINT = Point(Shape(20, 35), 0.25, [5])
NM = structure("nm-16")
WAIT = 60.0


def dies(*arguments: object) -> list[Check]:
    """As a segmentation fault ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def hangs(*arguments: object) -> list[Check]:
    """As a kernel that waits for itself."""
    time.sleep(3600)
    return []


def raises(*arguments: object) -> list[Check]:
    """As an illegal memory access shows."""
    raise RuntimeError("illegal\naccess")


def test_checks_in_a_process_of_their_own() -> None:
    found = apart(checks_at, NM, POINT, session(), time.monotonic() + WAIT)
    assert found and all(one.passed for one in found)
    assert {one.structure for one in found} == {"nm group=16"}


@pytest.mark.parametrize(
    ("work", "wait", "note"),
    [
        (dies, WAIT, "its process ended with status -9"),
        (raises, WAIT, "RuntimeError: illegal access"),
        (hangs, 0.1, "no result in time"),
    ],
)
def test_without_a_result_all_kernels_of_a_structure_have_failed(
    work: gpu_all.Work, wait: float, note: str
) -> None:
    (check,) = apart(work, NM, POINT, session(), time.monotonic() + wait)
    assert not check.passed and check.note == note
    verdicts = gpu_all.checks.verdicts([check], torch.float32)
    own = session(verdicts={**verdicts, ("packed, torch", "nm group=16", False): ""})
    assert own.refusal("packed, torch", "nm group=16", backward=False).startswith("failed its")
    assert own.refusal("packed, torch", "nm group=32", backward=False) == "was not checked"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> BenchSchema:
    """Two structures, checked in this process, with two weights of each."""

    def check(session: object, structures: list[Structure]) -> Iterator[list[Check]]:
        for one in structures:
            yield checks_at(one, POINT, torch.float32, torch.device("cpu"))

    for module in (sides, roofline):
        monkeypatch.setattr(module, "rotation", lambda size, device: 2)
    monkeypatch.setattr(decision, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(gpu_all, "check", check)
    return replace(settings("gpu_all"), structures=["nm-16", "unstructured"])


def rows(asked: BenchSchema, said: list[str]) -> dict[str, list[Row]]:
    """All rows of each suite."""
    found = gpu_all.run(asked, session(said))
    return {suite: [row for case in cases for row in case] for suite, cases in found}


def test_what_failed_or_was_not_checked_is_not_timed(
    small: BenchSchema, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu_all.checks.condensed_matmul
    monkeypatch.setattr(
        gpu_all.checks, "condensed_matmul", lambda x, w, backend: right(x, w, backend=backend) + 1
    )
    product = gpu_all.checks._product

    def some(case: object, topology: object, backend: str, suffix: str) -> Iterator[Check]:
        if (describe(case.structure), backend) != ("nm group=16", "torch"):  # type: ignore[attr-defined]
            yield from product(case, topology, backend, suffix)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_all.checks, "_product", some)
    monkeypatch.setattr(gpu_all, "PARTS", [Part("layers", layers.run, 1.0, {})])
    said: list[str] = []
    results = rows(small, said)
    assert list(results) == ["checks", "layers"]
    assert {row["passed"] for row in results["checks"]} == {True, False}
    assert any("checks passed" in line for line in said)
    notes = {
        (row["structure"], row["form"]): str(row["note"]) for row in results["layers"]
        if row["p50_ms"] == ""
    }  # fmt: skip
    assert notes.pop(("unstructured", "condensed")).startswith("failed its check: forward")
    assert notes == {
        ("nm group=16", "packed, torch"): "was not checked",
        ("nm group=16", "layer"): "was not checked",
    }
    others = [row for row in results["layers"] if row["structure"] == "unstructured"]
    assert {"packed, torch", "torch CSR"} <= {row["form"] for row in others if row["p50_ms"]}


def test_a_suite_that_ends_in_an_exception_leaves_the_others(
    small: BenchSchema, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(told: BenchSchema, session: object) -> Iterator[list[Row]]:
        yield [{"scopes": told.scopes, "structures": told.structures}]
        if told.scopes == ["first"]:
            raise RuntimeError("no\nmemory")

    first = Part("model_train", run, 0.5, {"scopes": ["first"], "structures": ["block-8"]})
    second = Part("model_inference", run, 0.5, {"scopes": ["second"]})
    monkeypatch.setattr(gpu_all, "PARTS", [first, second, first])
    said: list[str] = []
    results = rows(small, said)
    # What the user asked for counts; the same again is left out.
    assert results["model_train"] == [{"scopes": ["first"], "structures": small.structures}]
    assert results["model_inference"] == [{"scopes": ["second"], "structures": small.structures}]
    assert "model_train: ended by RuntimeError: no memory" in said
