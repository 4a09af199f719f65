"""Training of weights whose rows have inputs of their own."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from padst_kernels.entries import EntryIndex, entry_index, entry_matmul, native, op

FLOORS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# Outputs, inputs, entries, padding.
SHAPES = [(67, 41, 300, 5), (41, 67, 41 * 67, 1), (3, 300, 90, 0), (130, 64, 700, 9), (1, 3, 1, 0)]
TOKENS = [0, 1, 5, 9, 33, 197]


@dataclass
class Case:
    x: Tensor
    values: Tensor
    entries: Tensor
    out_features: int
    index: EntryIndex

    def dense(self, dtype: torch.dtype, dy: Tensor) -> tuple[Tensor, ...]:
        """y, dx and the gradient of the values by way of a dense weight."""
        x = self.x.detach().to(dtype).requires_grad_()
        values = self.values.detach().to(dtype).requires_grad_()
        size = self.out_features * x.shape[-1]
        inside = torch.where(self.entries < size, values, 0)
        flat = torch.zeros(size + 1, dtype=dtype).scatter(
            0, self.entries.flatten(), inside.flatten()
        )
        y = x @ flat[:-1].view(self.out_features, -1).t()
        return y, *torch.autograd.grad(y, (x, values), dy.to(dtype))


def make_case(
    shape: tuple[int, ...], tokens: int, dtype: torch.dtype, by_row: bool = False
) -> Case:
    """Every value in a frame of its own; rows in any order, padding anywhere, unless `by_row`."""
    outputs, inputs, count, padding = shape
    entries = torch.randperm(outputs * inputs)[:count]
    entries = torch.cat([entries, torch.full((padding,), outputs * inputs)])
    entries = entries.sort().values if by_row else entries[torch.randperm(len(entries))]
    entries = entries[:, None]
    values = torch.randn(entries.shape)
    return Case(
        torch.randn(tokens, inputs).to(dtype).requires_grad_(),
        values.to(dtype).requires_grad_(),
        entries,
        outputs,
        entry_index(entries, outputs, inputs, by_row=by_row),
    )


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.functions():
        pytest.skip("no compiler")
    return request.param


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.detach().double() - expected.detach()
    return float(difference.norm() / expected.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_dense_product(
    shape: tuple[int, ...], tokens: int, by_row: bool, dtype: torch.dtype, backend: str
) -> None:
    case = make_case(shape, tokens, dtype, by_row)
    y = entry_matmul(case.x, case.values, case.index, case.out_features, backend=backend)
    dy = torch.randn_like(y)
    ours = (y, *torch.autograd.grad(y, (case.x, case.values), dy))
    exact = case.dense(torch.float64, dy)
    # Half precision may be as wrong as twice PyTorch's own product.
    dense_errors = map(relative_error, case.dense(dtype, dy), exact)
    for actual, expected, error in zip(ours, exact, dense_errors, strict=True):
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert relative_error(actual, expected) <= max(2 * error, FLOORS[dtype])
    assert (ours[2][case.entries == case.out_features * case.x.shape[1]] == 0).all()


def test_shapes_of_the_index_do_not_depend_on_the_topology() -> None:
    first, second = (make_case(SHAPES[0], 1, torch.float32).index for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert one is not None and two is not None
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
    assert make_case(SHAPES[0], 1, torch.float32, by_row=True).index.order is None


def test_half_the_rows_without_entries(backend: str) -> None:
    entries = torch.arange(0, 40 * 30, 7)
    entries = entries[entries // 30 % 2 == 0]
    case = Case(
        torch.randn(6, 30, requires_grad=True),
        torch.randn(len(entries), requires_grad=True),
        entries,
        40,
        entry_index(entries, 40, 30),
    )
    y = entry_matmul(case.x, case.values, case.index, 40, backend=backend)
    torch.testing.assert_close(y, case.dense(torch.float32, torch.randn_like(y))[0])
    assert (y[:, 1::2] == 0).all()


def test_takes_any_strides_and_leading_dimensions(backend: str) -> None:
    case = make_case(SHAPES[0], 60, torch.float32)
    x = case.x.detach().t().contiguous().t().view(5, 12, 41).requires_grad_()
    values = case.values.detach().expand(-1, 2)[:, :1].requires_grad_()
    y = entry_matmul(x, values, case.index, 67, backend=backend)
    assert y.shape == (5, 12, 67)
    dy = torch.randn(67, 12, 5).permute(2, 1, 0)
    dx, dvalues = torch.autograd.grad(y, (x, values), dy)
    expected = case.dense(torch.float32, dy.reshape(60, 67))
    torch.testing.assert_close(y.flatten(0, 1), expected[0])
    torch.testing.assert_close(dx.flatten(0, 1), expected[1])
    torch.testing.assert_close(dvalues, expected[2])


def test_computes_only_the_gradients_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SHAPES[0], 9, torch.float64)
    monkeypatch.setattr(op, "_input_gradient", None)
    entry_matmul(case.x.detach(), case.values, case.index, 67, backend="native").sum().backward()
    assert case.values.grad is not None
    monkeypatch.undo()
    monkeypatch.setattr(op, "_values_gradient", None)
    entry_matmul(case.x, case.values.detach(), case.index, 67, backend="native").sum().backward()
    assert case.x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 16, 500])
def test_threads_change_no_bit(tokens: int, dtype: torch.dtype) -> None:
    case = make_case((700, 300, 140_000, 20), tokens, dtype)

    def run() -> tuple[Tensor, ...]:
        y = entry_matmul(case.x, case.values, case.index, 700, backend="native")
        return y, *torch.autograd.grad(y, (case.x, case.values), torch.ones_like(y))

    single = run()
    torch.set_num_threads(2)
    try:
        double = run()
    finally:
        torch.set_num_threads(1)
    for one, two in zip(single, double, strict=True):
        assert torch.equal(one, two)


def test_compiles_whole_and_survives_new_topologies() -> None:
    case = make_case(SHAPES[0], 40, torch.float32)
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count)
    def run(x: Tensor, values: Tensor, index: EntryIndex) -> Tensor:
        return entry_matmul(x, values, index, 67, backend="native").relu()

    for _ in range(2):
        y = run(case.x, case.values, case.index)
        dy = torch.randn_like(y)
        expected = case.dense(torch.float32, dy * (y > 0))
        torch.testing.assert_close(y, expected[0].relu())
        gradients = torch.autograd.grad(y, (case.x, case.values), dy)
        for ours, theirs in zip(gradients, expected[1:], strict=True):
            torch.testing.assert_close(ours, theirs)
        new = make_case(SHAPES[0], 40, torch.float32)
        for old_tensor, new_tensor in zip(case.index, new.index, strict=True):
            assert old_tensor is not None and new_tensor is not None
            old_tensor.copy_(new_tensor)
        case.entries = new.entries
    assert count.frame_count == 1


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize(
    ("by_row", "by_column", "place", "number"),
    [
        ("columns", "rows", 3, 67),
        ("order", "slots", 7, 305),
        ("order", "slots", 3, -1),
        ("row_pointer", "column_pointer", 9, 1 << 20),
    ],
)
def test_an_index_out_of_range_is_an_error_not_a_crash(
    by_row: str, by_column: str, place: int, number: int, tokens: int
) -> None:
    if not native.functions():
        pytest.skip("no compiler")
    case = make_case(SHAPES[0], tokens, torch.float32)
    dy = entry_matmul(case.x, case.values, case.index, 67, backend="native")
    getattr(case.index, by_row)[place] = number
    getattr(case.index, by_column)[place] = number
    with pytest.raises(IndexError, match="out of range"):
        native.product(case.x, case.values, case.index, 67)
    with pytest.raises(IndexError, match="out of range"):
        native.input_gradient(dy, case.values, case.index)
    with pytest.raises(IndexError, match="out of range"):
        native.values_gradient(case.x, dy, case.index)


def test_plain_pytorch_sees_features_out_of_range() -> None:
    case = make_case(SHAPES[0], 4, torch.float32)
    case.index.columns[3] = 41
    with pytest.raises(IndexError, match="out of range"):
        entry_matmul(case.x, case.values, case.index, 67, backend="torch")


def test_names_shapes_dtypes_and_promises_that_do_not_hold() -> None:
    case = make_case(SHAPES[0], 4, torch.float32)
    with pytest.raises(ValueError, match="expected 305 elements"):
        entry_matmul(case.x, case.values[1:], case.index, 67, backend="native")
    with pytest.raises(ValueError, match="expected 41 features"):
        entry_matmul(case.x[:, :40], case.values, case.index, 67, backend="native")
    with pytest.raises(ValueError, match=r"expected 41 features of torch\.float64"):
        entry_matmul(case.x, case.values.double(), case.index, 67, backend="native")
    with pytest.raises(ValueError, match="do not ascend"):
        entry_index(case.entries, 67, 41, by_row=True)
