"""`tile_matmul(backend="triton")` against dense float64; interpreted where there is no GPU."""

import pytest
import torch
from torch import Tensor

from padst_kernels.tiles import TileIndex, kernels, tile_index, tile_matmul
from tile_cases import CASES, DEVICE, blocks, relative_error, vector_nm

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 67])
def test_equals_the_dense_product(name: str, permuted: bool, num_tokens: int) -> None:
    case = CASES[name](permuted)
    out_features, in_features = case.shape
    x = torch.randn(num_tokens, in_features, device=DEVICE, requires_grad=True)
    dy = torch.randn(num_tokens, out_features, device=DEVICE)
    y = tile_matmul(x, case.weight, case.index, out_features, backend="triton")
    dx, dweight = torch.autograd.grad(y, (x, case.weight), dy)
    exact_x = x.detach().cpu().double().requires_grad_()
    exact = exact_x @ case.dense().T
    expected = torch.autograd.grad(exact, (exact_x, case.weight), dy.cpu().double())
    assert relative_error(y, exact) < 1e-5
    assert relative_error(dx, expected[0]) < 1e-5
    assert relative_error(case.inside(dweight), expected[1].cpu().double()) < 1e-5
    assert dweight.isfinite().all()


def test_transposable_structures_need_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "launch_input_gradient", None)
    for permuted in (False, True):
        case = blocks((40, 67), 8, permuted)
        assert case.index.slots is None and case.index.tile_rows is None
        assert case.index.column_run == (1 if permuted else 8)
        x = torch.randn(3, 67, device=DEVICE, requires_grad=True)
        tile_matmul(x, case.weight.detach(), case.index, 40, backend="triton").sum().backward()
        assert x.grad is not None


def test_shapes_of_an_index_do_not_depend_on_the_topology() -> None:
    for name, make in CASES.items():
        first, second = (
            [None if t is None else t.shape for t in make(True).index] for _ in range(2)
        )
        assert first == second, name


def test_columns_that_are_no_partition_are_refused() -> None:
    columns = torch.arange(16).view(2, 8)
    options = {"height": 8, "num_row_groups": 2, "in_features": 16, "out_features": 16}
    assert (
        tile_index(columns, None, None, **options, num_column_groups=2).transposed_order is not None
    )
    for wrong in (columns.flip(1), columns + 1, torch.randperm(16).view(2, 8)):
        with pytest.raises(ValueError, match="the 8 columns of a tile are not one of 2 groups"):
            tile_index(wrong, None, None, **options, num_column_groups=2)


def test_tiles_of_padding_alone_change_nothing() -> None:
    columns = torch.arange(16).view(2, 8)
    options = {"height": 8, "num_row_groups": 2, "in_features": 15, "out_features": 16}
    owner = torch.tensor([0, 1])
    index = tile_index(columns.clamp(max=15), owner, None, **options, num_column_groups=2)
    more = torch.cat([columns.clamp(max=15), torch.full((1, 8), 15)])
    padded = tile_index(more, torch.tensor([0, 1, 0]), None, **options, num_column_groups=2)
    weight = torch.randn(3, 8, 8, device=DEVICE)
    x = torch.randn(5, 15, device=DEVICE, requires_grad=True)
    results = []
    for tiles, these in ((weight[:2], index), (weight, padded)):
        these = TileIndex._make(None if t is None else t.to(DEVICE) for t in these)
        y = tile_matmul(x, tiles, these, 16, backend="triton")
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*results)


def test_float64_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "launch_product", None)
    case = vector_nm(True)
    x = torch.randn(3, 45, dtype=torch.float64, device=DEVICE)
    y = tile_matmul(x, case.weight.double(), case.index, 44, backend="triton")
    assert relative_error(y, x.cpu() @ case.dense().T) < 1e-12


def test_says_where_a_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = vector_nm(False)
    with pytest.raises(ValueError, match="backend is 'opencl', expected one of"):
        tile_matmul(torch.zeros(1, 45), case.weight, case.index, 44, backend="opencl")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend 'triton' needs a GPU, got a tensor on cpu"):
        tile_matmul(torch.zeros(1, 45), case.weight, case.index, 44, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("num_column_groups", [None, 2])
def test_a_weight_without_tiles_is_zero(backend: str, num_column_groups: int | None) -> None:
    index = tile_index(
        torch.empty(0, 8, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
        None,
        height=8,
        num_row_groups=2,
        in_features=15,
        out_features=16,
        num_column_groups=num_column_groups,
    )
    index = TileIndex._make(None if t is None else t.to(DEVICE) for t in index)
    x = torch.randn(5, 15, device=DEVICE, requires_grad=True)
    weight = torch.empty(0, 8, 8, device=DEVICE, requires_grad=True)
    y = tile_matmul(x, weight, index, 16, backend=backend)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.randn_like(y))
    assert y.shape == (5, 16) and (y == 0).all()
    assert dx.shape == (5, 15) and (dx == 0).all() and dweight.shape == (0, 8, 8)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_index_is_made_of_columns_of_any_strides(backend: str) -> None:
    columns = torch.stack([torch.randperm(45)[:13] for _ in range(3)])
    options = {"height": 16, "num_row_groups": 3, "in_features": 45, "out_features": 44}
    x, weight = torch.randn(5, 45, device=DEVICE), torch.randn(3, 13, 16, device=DEVICE)
    results = []
    for these in (columns, columns.t().contiguous().t()):
        index = tile_index(these, None, None, **options)
        assert all(t is None or t.is_contiguous() for t in index)
        index = TileIndex._make(None if t is None else t.to(DEVICE) for t in index)
        results.append(tile_matmul(x, weight, index, 44, backend=backend))
    assert torch.equal(*results)


def test_float32_is_as_precise_as_pytorch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    launch = kernels.launch_product

    def launch_product(*args: object, precision: str, **options: object) -> Tensor:
        asked.append(precision)
        return launch(*args, **options)

    monkeypatch.setattr(kernels, "launch_product", launch_product)
    case, matmul = vector_nm(False), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x = torch.randn(5, 45, device=DEVICE)
    try:
        for matmul.fp32_precision in ("tf32", "ieee"):
            tile_matmul(x, case.weight, case.index, 44, backend="triton")
            tile_matmul(x.half(), case.weight.half(), case.index, 44, backend="triton")
        torch.set_float32_matmul_precision("high")
        tile_matmul(x, case.weight, case.index, 44, backend="triton")
    finally:
        matmul.fp32_precision = before
    assert asked == ["tf32", "ieee", "ieee", "ieee", "tf32"]


def test_compiles_whole_and_survives_new_topologies() -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count)
    def run(x: Tensor, weight: Tensor, index: TileIndex) -> Tensor:
        return tile_matmul(x, weight, index, 40, backend="triton").relu()

    first = blocks((40, 67), 8, True)
    x = torch.randn(5, 67, device=DEVICE, requires_grad=True)
    for _ in range(2):
        case = blocks((40, 67), 8, True)
        for old, new in zip(first.index, case.index, strict=True):
            if old is not None and new is not None:
                old.copy_(new)
        y = run(x, case.weight, first.index)
        expected = (x.double().cpu() @ case.dense().T).relu()
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, (x, case.weight), dy)
        exact = torch.autograd.grad(expected, (x, case.weight), dy.double().cpu())
        for ours, theirs in zip((y, *grads), (expected, *exact), strict=True):
            assert relative_error(ours, theirs.double().cpu()) < 1e-5
    assert count.frame_count == 1
