import functools
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from padst_kernels import compiled as compiled_module
from padst_kernels.compiled import compiled
from padst_kernels.tiles import (
    TileIndex,
    native,
    op,
    tile_index,
    tile_matmul,
    tile_matmul_reference,
)


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    columns: Tensor
    owner: Tensor | None
    positions: Tensor | None
    num_row_groups: int
    out_features: int
    index: TileIndex

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """The reference, with the zero feature that padding columns read."""
        return tile_matmul_reference(x, weight, self.index, self.out_features)


SHAPES = [
    # tokens, inputs, tiles, width, height, row groups, outputs
    (1, 7, 3, 2, 4, 3, 12),
    (3, 70, 5, 33, 69, 5, 341),
    (5, 33, 6, 5, 8, 3, 21),
    (4, 50, 3, 31, 80, 3, 240),
    (8, 50, 7, 31, 80, 3, 237),
    (9, 40, 4, 9, 128, 7, 896),
    (33, 61, 5, 21, 24, 5, 117),
    (63, 40, 9, 8, 16, 4, 64),
    (197, 70, 3, 33, 64, 3, 192),
    (200, 17, 4, 17, 1, 4, 4),
    (301, 71, 9, 13, 19, 5, 93),
    (450, 20, 2, 7, 16, 2, 32),
    (0, 17, 4, 17, 8, 4, 32),
]


def make_case(shape: tuple[int, ...], permuted: bool, dtype: torch.dtype) -> Case:
    tokens, inputs, tiles, width, height, groups, outputs = shape
    # Feature `inputs` is padding.
    columns = torch.stack([torch.randperm(inputs + 1)[:width] for _ in range(tiles)])
    owner = None if tiles == groups else torch.randint(0, groups, (tiles,))
    positions = torch.randperm(groups * height)[:outputs] if permuted else None
    index = tile_index(
        columns, owner, positions,
        height=height, num_row_groups=groups, in_features=inputs, out_features=outputs,
    )  # fmt: skip
    x, weight = torch.randn(tokens, inputs), torch.randn(tiles, width, height)
    return Case(
        x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), columns, owner, positions,
        groups, outputs, index,
    )  # fmt: skip


# What the compiler may use of this CPU; each set takes other paths through the C++ code.
INSTRUCTIONS = {
    "compiled": (),
    "no bfloat16": ("-mno-avx512bf16",),
    "AVX2": ("-mno-avx512f",),
    "SSE2": ("-march=x86-64",),
}


@functools.cache
def library(flags: tuple[str, ...]) -> Callable[..., bool] | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_module, "COMPILE", [*compiled_module.COMPILE, *flags])
        patch.setattr(native, "compiled", compiled.__wrapped__)
        return native.library.__wrapped__()


@pytest.fixture(
    params=[
        "torch",
        *(pytest.param(n, marks=[pytest.mark.slow] if f else []) for n, f in INSTRUCTIONS.items()),
    ]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        yield "torch"
        return
    flags = INSTRUCTIONS[request.param]
    if flags and platform.machine() != "x86_64":
        pytest.skip("instruction sets of another kind of CPU")
    function = library(flags)
    if function is None:
        pytest.skip("no compiler")
    monkeypatch.setattr(native, "library", lambda: function)
    yield "native"


@pytest.fixture
def uninitialized_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.detach().double() - expected.detach()
    return float(difference.norm() / expected.detach().norm().clamp(min=1e-30))


@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_dense_product(
    shape: tuple[int, ...], permuted: bool, dtype: torch.dtype, backend: str
) -> None:
    case = make_case(shape, permuted, dtype)
    y = tile_matmul(case.x, case.weight, case.index, case.out_features, backend=backend)
    dy = torch.randn_like(y)
    ours = (y, *torch.autograd.grad(y, (case.x, case.weight), dy))

    def dense(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = case.x.detach().to(dtype).requires_grad_()
        weight = case.weight.detach().to(dtype).requires_grad_()
        y = case.dense(x, weight)
        return y, *torch.autograd.grad(y, (x, weight), dy.to(dtype))

    exact = dense(torch.float64)
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
    errors = map(relative_error, dense(dtype), exact)
    for actual, expected, error in zip(ours, exact, errors, strict=True):
        assert actual.dtype == dtype and actual.shape == expected.shape
        # PyTorch rounds between its steps; we may be twice as wrong as its own dense product.
        assert relative_error(actual, expected) <= max(2 * error, bound[dtype])
        if dtype.itemsize == 2 and backend != "torch":
            # The compiled kernels sum in float32 and round once: half a unit in the last place.
            unit = torch.finfo(dtype).eps / 2
            allowed = unit * expected.abs() + 1e-6 * expected.norm()
            assert ((actual.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_what_no_column_reads_leaks_nowhere(tokens: int, dtype: torch.dtype, backend: str) -> None:
    case = make_case((tokens, 33, 6, 5, 32, 3, 90), True, dtype)
    unread = torch.ones(33, dtype=torch.bool)
    unread[case.columns[case.columns < 33]] = False
    assert unread.any()
    x = case.x.detach().clone()
    x[:, unread] = torch.nan
    zeroed = x.nan_to_num(0).requires_grad_()
    results = []
    for inputs in (x.requires_grad_(), zeroed):
        y = tile_matmul(inputs, case.weight, case.index, 90, backend=backend)
        grads = torch.autograd.grad(y, (inputs, case.weight), torch.ones_like(y))
        results.append((y, *grads))
    for poisoned, clean in zip(*results, strict=True):
        assert torch.equal(poisoned, clean)


def test_takes_any_strides_and_leading_dimensions(backend: str) -> None:
    case = make_case((60, 33, 6, 5, 8, 3, 21), True, torch.float32)
    weight = case.weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    x = case.x.detach().t().contiguous().t().view(5, 12, 33).requires_grad_()
    y = tile_matmul(x, weight, case.index, 21, backend=backend)
    assert y.shape == (5, 12, 21)
    dy = torch.randn(21, 12, 5).permute(2, 1, 0)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    expected = case.dense(case.x, case.weight)
    expected_grads = torch.autograd.grad(expected, (case.x, case.weight), dy.reshape(60, 21))
    torch.testing.assert_close(y.flatten(0, 1), expected)
    torch.testing.assert_close(dx.flatten(0, 1), expected_grads[0])
    torch.testing.assert_close(dweight, expected_grads[1])


def test_computes_only_the_gradients_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((9, 33, 6, 5, 8, 3, 21), False, torch.float64)
    monkeypatch.setattr(op, "input_gradient", None)
    tile_matmul(case.x.detach(), case.weight, case.index, 21, backend="native").sum().backward()
    assert case.weight.grad is not None
    monkeypatch.undo()
    monkeypatch.setattr(op, "weight_gradient", None)
    tile_matmul(case.x, case.weight.detach(), case.index, 21, backend="native").sum().backward()
    assert case.x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(500, 128, 8, 40, 64, 8, 512), (8, 300, 16, 257, 80, 16, 1280)])
def test_threads_change_no_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(shape, True, dtype)

    def run() -> tuple[Tensor, ...]:
        y = tile_matmul(case.x, case.weight, case.index, case.out_features, backend="native")
        return y, *torch.autograd.grad(y, (case.x, case.weight), torch.ones_like(y))

    single = run()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            for one, several in zip(single, run(), strict=True):
                assert torch.equal(one, several)
    finally:
        torch.set_num_threads(1)


def test_compiles_whole_and_survives_new_topologies() -> None:
    case = make_case((40, 33, 6, 5, 8, 3, 21), True, torch.float32)
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count)
    def run(x: Tensor, weight: Tensor, index: TileIndex) -> Tensor:
        return tile_matmul(x, weight, index, 21, backend="native").relu()

    for _ in range(2):
        y = run(case.x, case.weight, case.index)
        expected = case.dense(case.x, case.weight).relu()
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        for ours, theirs in zip(
            torch.autograd.grad(y, (case.x, case.weight), dy),
            torch.autograd.grad(expected, (case.x, case.weight), dy),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
        new = make_case((40, 33, 6, 5, 8, 3, 21), True, torch.float32)
        for old_tensor, new_tensor in zip(case.index, new.index, strict=True):
            assert (old_tensor is None) == (new_tensor is None)
            if old_tensor is not None:
                old_tensor.copy_(new_tensor)
        case.columns, case.owner, case.positions = new.columns, new.owner, new.positions
    assert count.frame_count == 1


def test_names_shapes_and_dtypes_that_disagree() -> None:
    case = make_case((4, 33, 6, 5, 8, 3, 21), False, torch.float32)
    with pytest.raises(ValueError, match=r"columns is \(6, 5\)"):
        tile_matmul(case.x, case.weight[:, :3], case.index, 21, backend="native")
    with pytest.raises(ValueError, match="expected 33 features"):
        tile_matmul(case.x[:, :32], case.weight, case.index, 21, backend="native")
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        tile_matmul(case.x, case.weight.double(), case.index, 21, backend="native")
    with pytest.raises(ValueError, match="out_features is 25, the index has 24 rows"):
        tile_matmul(case.x, case.weight, case.index, 25, backend="native")


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    ("field", "place", "number"),
    [
        ("columns", 13, 34),
        ("columns", -1, -1),
        ("rows", 0, 1000),
        ("rows", -1, -5),
        ("row_pointer", 1, 1000),
        ("row_pointer", 0, -1),
        ("order", 0, 99),
        ("order", -1, -1),
    ],
)
def test_an_index_out_of_range_is_an_error_not_a_crash(
    field: str, place: int, number: int, tokens: int
) -> None:
    if native.library() is None:
        pytest.skip("no compiler")
    case = make_case((tokens, 33, 6, 5, 8, 3, 21), True, torch.float32)
    index, dy = case.index, torch.ones(tokens, 21)
    getattr(index, field).view(-1)[place] = number
    with pytest.raises(IndexError, match="out of range"):
        native.product(case.x, case.weight, index, 21)
    with pytest.raises(IndexError, match="out of range"):
        native.input_gradient(dy, case.weight, index)
    with pytest.raises(IndexError, match="out of range"):
        native.weight_gradient(case.x, dy, index, 8)


def test_plain_pytorch_sees_features_out_of_range() -> None:
    case = make_case((40, 33, 6, 5, 8, 3, 21), False, torch.float32)
    case.index.columns[2, 3] = 34
    with pytest.raises(IndexError, match="out of range"):
        tile_matmul(case.x, case.weight, case.index, 21, backend="torch")


def test_no_compiler_no_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    source = tmp_path / "kernel.cpp"
    source.write_text("int one() { return 1; }\n")
    assert compiled(source) is None
    assert "plain PyTorch instead" in caplog.text


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a library may be written, with an empty cache, if there is a compiler."""
    if native.library() is None:
        pytest.skip("no compiler")
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "kernel.cpp"


def test_says_why_the_compiler_refuses(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text('#include "wrong.h"\n')
    source.with_name("wrong.h").write_text("int one() { return two; }\n")
    assert compiled(source) is None
    assert "error: " in caplog.text and "In file included" not in caplog.text


def test_no_home_directory_no_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PADST_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    # As of a user whom the system does not know.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    source = tmp_path / "kernel.cpp"
    source.write_text("int one() { return 1; }\n")
    assert compiled(source) is None
    assert "instead: Could not determine home directory." in caplog.text


def test_a_library_is_built_once_for_each_version_of_its_files(
    source: Path, tmp_path: Path
) -> None:
    header = source.with_name("one.h")
    source.write_text('#include "one.h"\nextern "C" int one() { return ONE; }\n')
    header.write_text("#define ONE 1\n")
    first = compiled_module._build(source)
    built = first.stat().st_mtime_ns
    assert compiled_module._build(source) == first and first.stat().st_mtime_ns == built
    assert sorted((tmp_path / "cache").iterdir()) == [first]
    header.write_text("#define ONE 2\n")
    assert compiled_module._build(source) != first
