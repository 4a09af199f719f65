from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.bench_cases import session, settings
from padst_exp.bench import dense, layers, roofline, sides
from padst_exp.bench.configurations import Shape, structure
from padst_exp.bench.roofline import BytesTwin
from padst_exp.bench.session import Session
from padst_exp.bench.sides import Side
from padst_exp.bench.topology import topology
from padst_exp.dispatch import decision

SHAPE = Shape(32, 48)
PACKED, NM = "packed, torch", "nm group=16"


@pytest.fixture(autouse=True)
def few_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two weights of each side instead of as many as a cache holds."""
    monkeypatch.setattr(sides, "rotation", lambda size, device: 2)
    monkeypatch.setattr(roofline, "rotation", lambda size, device: 2)
    monkeypatch.setattr(decision, "cache_folder", lambda: tmp_path)


def weight_of(side: Side, which: int, in_features: int = 32) -> Tensor:
    """The dense weight `[O, I]` that a side multiplies with."""
    with torch.no_grad():
        return side.product(torch.eye(in_features), side.weights[which]).t()


NAMES = ["nm-16", "nm-1", "block-8", "diag-stride-4", "diag-1", "unstructured"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", [1, 3])
def test_every_side_multiplies_with_as_many_weights_as_it_says(name: str, split: int) -> None:
    shape = Shape(32, 48, split)
    found = sides.sparse_sides(session(), shape, structure(name), 0.25, plain=True)
    found += sides.permuted_sides(session(), shape, structure(name), 0.25)
    assert found
    for side in found:
        if side.permutation != "soft":
            count = int((weight_of(side, 1) != 0).sum())
            assert count == side.entries, side.name
            assert side.density == pytest.approx(count / (32 * 48))
        assert len(side.weights) == 2


def test_dense_sides_agree() -> None:
    plain, *others = sides.dense_sides(session(), SHAPE)
    x = torch.randn(5, 32)
    for side in others:
        torch.testing.assert_close(
            side.product(x, side.weights[0]), linear(x, plain.weights[0]), msg=side.name
        )
    (masked,) = sides.masked_sides(session(), SHAPE, structure("nm-16"), 0.25, plain)
    assert int((weight_of(masked, 0) != 0).sum()) == 48 * 8


@pytest.mark.parametrize("compiled", [False, True])
def test_onednn_differentiates_as_pytorch_does(compiled: bool) -> None:
    if not dense.has_onednn(torch.device("cpu"), torch.float32):
        pytest.skip("no oneDNN")
    x, dy = torch.randn(7, 33, requires_grad=True), torch.randn(7, 21)
    weight = torch.randn(21, 33, requires_grad=True)
    theirs = torch.autograd.grad(linear(x, weight), (x, weight), dy)
    product = torch.compile(dense.onednn_linear) if compiled else dense.onednn_linear
    ours = torch.autograd.grad(product(x, weight), (x, weight), dy)
    torch.testing.assert_close(ours, theirs)


def test_the_twin_reads_and_writes_every_byte_once() -> None:
    passes = ("forward", "dX", "dW")
    twin = BytesTwin(4 * 50, 4 * 70, 4 * 30, passes=passes, device=torch.device("cpu"))
    moves = twin.variants[0]
    read = sum(len(source) for source, _ in moves if source is not None)
    written = sum(len(target) for _, target in moves if target is not None)
    assert read == (50 + 30) + (70 + 30) + (50 + 70)
    assert written == 70 + 50 + 30
    twin()


def test_every_cell_has_every_side_with_numbers() -> None:
    said: list[str] = []
    rows = [row for case in layers.run(settings(), session(said)) for row in case]
    cells = {(row["tokens"], row["pass"]) for row in rows}
    assert cells == {(5, "forward"), (5, "forward+backward"), (0, "conversion")}
    forms = {(row["structure"], row["form"]) for row in rows}
    assert {("dense", "eager"), ("dense", "compiled"), ("nm group=16", "packed, torch"),
            ("unstructured", "torch CSR"), ("block size=8", "torch BSR"),
            ("nm group=1", "condensed"), ("nm group=16", "masked dense"),
            ("nm group=16", "fold")} <= forms  # fmt: skip
    assert any("2:4: skipped, needs a GPU" in line for line in said)
    for row in rows:
        assert row["p50_ms"] > 0 and not row["note"], row
        if row["pass"] != "conversion":
            assert row["ratio"] > 0 and row["floor_ms"] > 0
    dispatched = {row["dispatcher"] for row in rows if str(row["form"]).startswith("packed")}
    assert dispatched and dispatched <= {"torch", "dense"}
    reference = {row["dense_form"] for row in rows if row["dense_form"]}
    assert reference <= {"dense, eager", "dense, compiled"}
    for column in ("device", "instructions", "threads", "torch", "triton", "commit", "dtype",
                   "density_asked", "density", "scope", "accuracy", "copy_gb_per_s"):  # fmt: skip
        assert all(column in row for row in rows)


def test_sides_have_the_permutations_that_training_has() -> None:
    shape, tall, split = Shape(32, 48), Shape(48, 32), Shape(32, 48, 3)
    found = [topology(session(), s, structure("nm-16"), 0.25) for s in (shape, tall, split)]
    assert [one.permutation for one in found] == ["hard"] * 3
    assert [one.input_index is None for one in found] == [False, True, False]
    assert found[1].output_index() is not None and found[2].output_index() is None
    assert topology(session(), shape, structure("unstructured"), 0.25).permutation == "none"
    rows = [row for case in layers.run(settings(), session()) for row in case]
    forms = {(row["structure"], row["permutation"]) for row in rows if row["form"] == PACKED}
    assert forms == {
        ("nm group=16", "hard"), ("nm group=16", "none"), ("block size=8", "hard"),
        ("block size=8", "none"), ("nm group=1", "hard"), ("diag bundle=1", "hard"),
        ("unstructured", "none"),
    }  # fmt: skip


@pytest.mark.parametrize("shape", [Shape(32, 48), Shape(48, 32)])
def test_every_side_of_one_topology_permutes_alike(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All values are 1: what is left are the places."""
    monkeypatch.setattr(Session, "random", lambda self, *size: torch.ones(size))
    for name in ("block-8", "nm-1"):
        first, *others = sides.sparse_sides(session(), shape, structure(name), 0.25, plain=False)
        assert others
        for side in others:
            ours, theirs = (weight_of(s, 0, shape.in_features) for s in (side, first))
            assert torch.equal(ours, theirs), side.name


def test_refused_kernels_stand_in_the_table_without_a_time() -> None:
    verdicts = {(PACKED, NM, False): "", (PACKED, NM, True): "failed its check: dX"}
    only = settings()
    only.structures = ["nm-16"]
    rows = [row for case in layers.run(only, session(verdicts=verdicts)) for row in case]
    packed = {row["pass"]: row for row in rows if row["form"] == PACKED}
    assert packed["forward"]["p50_ms"] and not packed["forward"]["note"]
    assert packed["forward+backward"]["p50_ms"] == ""
    assert packed["forward+backward"]["note"] == "failed its check: dX"
    assert not any(row["dispatcher"] for row in packed.values())


def test_structures_that_do_not_fit_are_named() -> None:
    said: list[str] = []
    only = settings()
    only.structures, only.shapes = ["diag-stride-32", "nm-16"], ["50x30"]
    rows = [row for case in layers.run(only, session(said)) for row in case]
    assert any(line.startswith("diag stride=32 in 30->50: skipped") for line in said)
    assert {row["structure"] for row in rows} == {"dense", "nm group=16"}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_timed_apart(name: str) -> None:
    x, dy = torch.randn(5, 32), torch.randn(5, 48)
    for side in sides.sparse_sides(session(), SHAPE, structure(name), 0.25, plain=False):
        if side.trained is None:
            continue
        both = layers._pass(side, x, dy, "forward+backward")()
        dx = layers._pass(side, x, dy, "dX")()
        dweight = layers._pass(side, x, dy, "dW")()
        assert isinstance(both, tuple) and isinstance(dx, tuple) and isinstance(dweight, tuple)
        torch.testing.assert_close((*dx, *dweight), both, msg=side.name)
