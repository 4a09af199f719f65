"""Single diagonals on the Triton kernels, against dense float64."""

import pytest
import torch
from torch import Tensor

from padst_kernels.activations import empty_features
from padst_kernels.diagonals import diagonal_matmul
from padst_kernels.diagonals.kernels import launch_diagonals, launch_diagonals_gradient

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(40, 24), (24, 40), (33, 33)]  # outputs, inputs


def activation(num_features: int, num_tokens: int, feature_major: bool) -> Tensor:
    like = torch.empty(0, device=DEVICE)
    x = empty_features(num_features, num_tokens, like, feature_major)
    return x.copy_(torch.randn(num_features, num_tokens))


def assert_close(value: Tensor, expected: Tensor) -> None:
    error = (value.double().cpu() - expected).norm() / expected.norm()
    assert error < 1e-4, float(error)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 197])
@pytest.mark.parametrize("feature_major", [True, False])
@pytest.mark.parametrize("permuted", [False, True])
def test_diagonals_forward_and_backward(
    shape: tuple[int, int], num_tokens: int, feature_major: bool, permuted: bool
) -> None:
    out_features, in_features = shape
    num_cells, longer = min(shape), max(shape)
    offsets = torch.tensor([0, 3, 17, longer - 1])
    values = torch.randn(4, num_cells, device=DEVICE)
    columns, rows = torch.randperm(in_features), torch.randperm(out_features)

    by_row = out_features < in_features
    step = torch.arange(num_cells)
    along = (step + offsets[:, None]) % longer
    short = step.expand(4, -1)
    cell_rows, cell_columns = (short, along) if by_row else (along, short)
    if permuted:
        cell_rows, cell_columns = rows[cell_rows], columns[cell_columns]
    dense = torch.zeros(shape, dtype=torch.float64)
    dense[cell_rows, cell_columns] = values.double().cpu()

    x = activation(in_features, num_tokens, feature_major)
    dy = activation(out_features, num_tokens, not feature_major)
    offsets, columns, rows = (index.to(DEVICE, torch.int32) for index in (offsets, columns, rows))
    fold = {"columns": columns, "rows": rows} if permuted else {}
    back = {"columns": rows, "rows": columns} if permuted else {}
    y = launch_diagonals(x, values, offsets, out_features, by_row=by_row, **fold)
    assert_close(y, dense @ x.double().cpu())
    dx = launch_diagonals(
        dy, values, offsets, in_features, by_row=not by_row, feature_major=feature_major, **back
    )
    assert_close(dx, dense.T @ dy.double().cpu())
    dvalues = launch_diagonals_gradient(x, dy, offsets, by_row=by_row, **fold)
    expected = (dy.double() @ x.double().T).cpu()[cell_rows, cell_columns]
    assert_close(dvalues, expected)


def make_layer(shape: tuple[int, int], permuted: bool) -> tuple[Tensor, ...]:
    """Values, offsets, columns, rows and what they mean: rows and columns of the cells."""
    out_features, in_features = shape
    offsets = torch.randperm(max(shape))[:4]
    values = torch.randn(4, min(shape), device=DEVICE, requires_grad=True)
    columns, rows = torch.randperm(in_features), torch.randperm(out_features)
    if not permuted:
        columns, rows = columns.sort().values, rows.sort().values
    short = torch.arange(min(shape)).expand(4, -1)
    along = (short + offsets[:, None]) % max(shape)
    cells = (short, along) if out_features < in_features else (along, short)
    indices = (index.to(DEVICE, torch.int32) for index in (offsets, columns, rows))
    return values, *indices, rows[cells[0]], columns[cells[1]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_diagonal_matmul_equals_the_dense_product(
    backend: str, shape: tuple[int, int], permuted: bool, dtype: torch.dtype
) -> None:
    values, offsets, columns, rows, *cells = make_layer(shape, permuted)
    values = values.detach().to(dtype).requires_grad_()
    fold = {"columns": columns, "rows": rows} if permuted else {}
    for tokens in ((), (5,), (3, 23)):
        x = torch.randn(*tokens, shape[1], device=DEVICE, dtype=dtype, requires_grad=True)
        y = diagonal_matmul(x, values, offsets, shape[0], backend=backend, **fold)
        dy = torch.randn_like(y)
        ours = y, *torch.autograd.grad(y, (x, values), dy)
        exact_x, exact_values = (t.detach().double().cpu().requires_grad_() for t in (x, values))
        dense = torch.zeros(shape, dtype=torch.float64).index_put(tuple(cells), exact_values)
        exact = exact_x @ dense.T
        theirs = exact, *torch.autograd.grad(exact, (exact_x, exact_values), dy.double().cpu())
        for actual, expected in zip(ours, theirs, strict=True):
            assert actual.dtype == dtype and actual.shape == expected.shape
            torch.testing.assert_close(actual.double().cpu(), expected, rtol=1e-4, atol=1e-5)


def test_diagonal_matmul_compiles_whole_and_survives_new_topologies() -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count)
    def run(x: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        return diagonal_matmul(x, values, offsets, 40, backend="triton").relu()

    x = torch.randn(5, 24, device=DEVICE, requires_grad=True)
    kept = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        values, offsets, *_ = make_layer((40, 24), False)
        kept.copy_(offsets)
        results = []
        for y in (run(x, values, kept), diagonal_matmul(x, values, offsets, 40).relu()):
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, values))))
        torch.testing.assert_close(*results)
    assert count.frame_count == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_indices_may_have_any_strides(backend: str) -> None:
    values, *indices, _, _ = make_layer((24, 40), True)
    x = torch.randn(5, 40, device=DEVICE)
    results = []
    for offsets, columns, rows in (indices, [torch.stack([t, t], 1)[:, 0] for t in indices]):
        y = diagonal_matmul(x, values, offsets, 24, columns=columns, rows=rows, backend=backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), values)))
    for plain, loose in zip(*results, strict=True):
        assert torch.equal(plain, loose)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_diagonals(backend: str) -> None:
    values, offsets, *_ = make_layer((24, 40), False)
    none, x = values.detach()[:0].requires_grad_(), torch.randn(5, 40, device=DEVICE)
    x.requires_grad_()
    y = diagonal_matmul(x, none, offsets[:0], 24, backend=backend)
    dx, dvalues = torch.autograd.grad(y, (x, none), torch.ones_like(y))
    assert (y == 0).all() and (dx == 0).all() and dvalues.shape == (0, 24)


@pytest.mark.gpu
def test_more_tokens_than_a_grid_has_tiles_along_its_second_axis() -> None:
    x = torch.randn(16 * 65_536 + 5, 24, device=DEVICE)
    values, offsets, *_ = make_layer((16, 24), False)
    y = diagonal_matmul(x, values, offsets, 16, backend="triton")
    expected = diagonal_matmul(x[-20:], values, offsets, 16)
    torch.testing.assert_close(y[-20:], expected)


def test_diagonal_matmul_names_what_disagrees() -> None:
    values, offsets, columns, *_ = make_layer((40, 24), False)
    x = torch.randn(5, 24, device=DEVICE)
    with pytest.raises(ValueError, match=r"values is \(4, 24\), expected \(4, 23\)"):
        diagonal_matmul(x[:, :23], values, offsets, 40)
    with pytest.raises(ValueError, match=r"rows is \(24,\), expected \(40,\)"):
        diagonal_matmul(x, values, offsets, 40, rows=columns)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        diagonal_matmul(x.double(), values, offsets, 40)
    with pytest.raises(ValueError, match="backend is 'opencl'"):
        diagonal_matmul(x, values, offsets, 40, backend="opencl")
