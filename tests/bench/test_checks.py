from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.bench_cases import CPU
from padst_exp.bench import checks
from padst_exp.bench.check_case import Check
from padst_exp.bench.configurations import Shape, structure

SHAPES = [Shape(20, 35), Shape(35, 20)]
NM = "nm group=64"


def found(
    name: str, dtype: torch.dtype = torch.float32, density: float = 0.25, split: int = 1
) -> list[Check]:
    """All checks of one structure on odd shapes, or even ones for diagonals in classes."""
    shapes = [Shape(32, 48)] if name.startswith("diag-stride") else SHAPES
    if split > 1:
        shapes = [Shape(20, 35 * split, split)]
    results: list[Check] = []
    for shape in shapes:
        results += checks.run(structure(name), shape, density, [5], dtype, CPU)
    return results


@pytest.mark.parametrize(
    ("name", "split"), [("nm-16", 1), ("block-8", 1), ("diag-stride-4", 1), ("nm-16", 3)]
)
def test_tiles_pass_in_the_interpreter(name: str, split: int) -> None:
    results = found(name, split=split)
    assert all(result.passed for result in results), [r for r in results if not r.passed]
    kinds = {(result.kernel, result.what.partition(",")[0]) for result in results}
    assert {(kernel, what)
            for kernel in ("packed, torch", "packed, triton", "packed, scattered",
                           "features, torch", "features, triton")
            for what in ("forward", "dX", "dW")} <= kinds  # fmt: skip
    what = " ".join(result.what for result in results)
    assert all(word in what for word in ("permuted", "bias", "gelu", "residual", "norm"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("nm-1", torch.float32),
        ("nm-1", torch.bfloat16),
        ("unstructured", torch.float32),
        ("diag-1", torch.float32),
    ],
)
def test_single_entries_pass(name: str, dtype: torch.dtype) -> None:
    results = found(name, dtype)
    assert all(result.passed for result in results), [r for r in results if not r.passed]
    kernels = {result.kernel for result in results}
    assert {"condensed", "packed, torch", "packed, scattered"} <= kernels
    assert ("packed, triton" in kernels) == (name == "diag-1")


def test_condensed_triton_passes_for_as_many_tokens_as_it_is_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for most, kernels in ((5, {"condensed, triton"}), (4, set())):
        monkeypatch.setattr(checks, "condensed", lambda device, most=most: {"triton": most})
        results = [one for one in found("nm-1") if one.kernel.startswith("condensed")]
        assert {one.kernel for one in results} == kernels
        assert all(one.passed for one in results)


@pytest.mark.parametrize(
    ("wrong", "kept"),
    [(lambda y: y * 1.001, 0), (lambda y: y * torch.nan, 0), (lambda y: y, 1)],
)
def test_wrong_results_fail(monkeypatch: pytest.MonkeyPatch, wrong: object, kept: int) -> None:
    right = checks.condensed_matmul
    monkeypatch.setattr(
        checks, "condensed_matmul", lambda x, w, backend: wrong(right(x, w, backend=backend))  # type: ignore[operator]
    )  # fmt: skip
    condensed = [result for result in found("unstructured") if result.kernel == "condensed"]
    assert condensed and all(result.passed == bool(kept) for result in condensed)


def test_kernels_that_do_not_run_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor, weight: object, backend: str) -> Tensor:
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(checks, "condensed_matmul", broken)
    results = [result for result in found("unstructured") if result.kernel == "condensed"]
    assert {result.note for result in results} == {"RuntimeError: no kernel image"}
    assert not any(result.passed for result in results)
    verdicts = checks.verdicts(results, torch.float32)
    assert all(verdicts["condensed", "unstructured", backward] for backward in (False, True))
    assert checks.verdicts(results, torch.bfloat16) == {}


def test_a_failed_gradient_refuses_the_backward_row_alone() -> None:
    good = Check("packed, triton", NM, "forward, 5 tokens", "float32", 1e-4, 1e-3)
    bad = replace(good, what="dX, 5 tokens", error=1.0)
    for order in ([good, bad], [bad, good]):
        verdicts = checks.verdicts(order, torch.float32)
        assert verdicts["packed, triton", NM, False] == ""
        assert verdicts["packed, triton", NM, True].startswith("failed its check: dX, 5 tokens")


def test_cuda_is_refused_with_triton() -> None:
    cuda = Check("packed, cuda", NM, "forward, 5 tokens", "float32", 1e-4, 1e-3)
    triton = replace(cuda, kernel="packed, triton", error=float("nan"))
    both = checks.verdicts([cuda, triton], torch.float32)
    assert all(both["packed, cuda", NM, backward] for backward in (False, True))
    alone = checks.verdicts([replace(cuda, error=1.0), replace(triton, error=0.0)], torch.float32)
    assert alone["packed, cuda", NM, False] and not alone["packed, triton", NM, False]
