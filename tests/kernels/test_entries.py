"""Training of weights whose rows have inputs of their own: `entry_matmul`, `entry_index`."""

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_cases import (
    DEVICE,
    FLOORS,
    Entries,
    assert_agrees,
    make_entries,
    needs,
    random_entries,
)
from padst_kernels import Backend
from padst_kernels.entries import EntryIndex, entry_index, entry_matmul, native
from padst_kernels.entries.reference import dense_weight

BACKENDS: list[Backend] = ["native", "torch"]
# Shape, entries, padding.
SHAPES = [
    ((67, 41), 300, 5),
    ((41, 67), 41 * 67, 1),
    ((3, 300), 90, 0),
    ((130, 64), 700, 9),
    ((1, 3), 1, 0),
    ((20, 9), 0, 2),
]


def small() -> Entries:
    return random_entries(*SHAPES[0])


def test_the_reference_multiplies_with_the_weight_that_the_index_was_made_for() -> None:
    for shape in SHAPES:
        for by_row in (False, True):
            case = random_entries(*shape, by_row=by_row)
            assert torch.equal(dense_weight(case.values, case.index, shape[0][0]), case.dense())


def check_shapes(backend: Backend, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for by_row in (False, True):
            for tokens in (0, 1, 5, 9, 33, 197):
                case = random_entries(*shape, by_row=by_row)
                *_, dvalues = assert_agrees(
                    case.product(backend),
                    case.reference,
                    case.x(tokens, dtype=dtype),
                    case.values.to(dtype),
                    about=(shape, by_row, tokens),
                )
                assert (dvalues[case.entries == case.shape[0] * case.shape[1]] == 0).all()


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(backend: Backend, dtype: torch.dtype) -> None:
    needs(backend)
    check_shapes(backend, dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("other_instructions")
def test_equals_the_reference_with_other_instructions() -> None:
    for dtype in FLOORS:
        check_shapes("native", dtype)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(data=st.data())
def test_equals_the_reference_whatever_the_shape(data: st.DataObject) -> None:
    outputs, inputs = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    count = data.draw(st.integers(0, outputs * inputs))
    by_row = data.draw(st.booleans())
    case = random_entries((outputs, inputs), count, data.draw(st.integers(0, 9)), by_row=by_row)
    dtype = data.draw(st.sampled_from(list(FLOORS)))
    backend = data.draw(st.sampled_from(BACKENDS if DEVICE == "cpu" else BACKENDS[1:]))
    x = case.x(data.draw(st.integers(0, 70)), dtype=dtype)
    assert_agrees(case.product(backend), case.reference, x, case.values.to(dtype))


def test_a_wrong_native_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("native")
    case = small()
    x = case.x(9)
    assert_agrees(case.product("native"), case.reference, x, case.values)
    for name in ("product", "input_gradient", "values_gradient"):
        right = getattr(native, name)
        with monkeypatch.context() as patch:
            patch.setattr(native, name, lambda *a, right=right: right(*a) * 1.01)
            with pytest.raises(AssertionError, match=r"y|gradient"):
                assert_agrees(case.product("native"), case.reference, x, case.values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_entries_any_strides_and_leading_dimensions(backend: Backend) -> None:
    needs(backend)
    entries = torch.arange(0, 40 * 30, 7)
    case = make_entries((40, 30), entries[entries // 30 % 2 == 0])
    y, *_ = assert_agrees(case.product(backend), case.reference, case.x(6), case.values)
    assert (y[:, 1::2] == 0).all()

    case = small()
    x = case.x(60).t().contiguous().t().view(5, 12, 41)
    values = torch.cat([case.values, case.values], 1)[:, :1]
    dy = torch.randn(67, 12, 5, device=DEVICE).permute(2, 1, 0)
    assert_agrees(case.product(backend), case.reference, x, values, dy=dy)


def test_threads_change_no_bit() -> None:
    needs("native")
    for dtype in (torch.float32, torch.bfloat16):
        case = random_entries((700, 300), 140_000, 20)
        values = case.values.to(dtype).requires_grad_()
        for tokens in (1, 8, 16, 500):
            x = case.x(tokens, dtype=dtype).requires_grad_()
            results: list[tuple[Tensor, ...]] = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                try:
                    y = case.product("native")(x, values)
                    dy = torch.ones_like(y)
                    results.append((y, *torch.autograd.grad(y, (x, values), dy)))
                finally:
                    torch.set_num_threads(1)
            for one, two in zip(*results, strict=True):
                assert torch.equal(one, two)


def test_one_compilation_and_one_set_of_tensors_serve_every_topology() -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count)
    def run(x: Tensor, values: Tensor, index: EntryIndex) -> Tensor:
        return entry_matmul(x, values, index, 67, backend="native").relu()

    first = small()
    assert random_entries(*SHAPES[0], by_row=True).index.order is None
    for _ in range(2):
        case = small()
        for old, new in zip(first.index, case.index, strict=True):
            assert old is not None and new is not None
            assert (old.shape, old.dtype) == (new.shape, new.dtype)
            old.copy_(new)
        assert_agrees(
            lambda x, v: run(x, v, first.index),
            lambda x, v, case=case: case.reference(x, v).relu(),
            case.x(40),
            case.values,
        )
    assert count.frame_count == 1


def test_an_index_out_of_range_is_an_error_not_a_crash() -> None:
    needs("native")
    for tokens in (1, 9, 40):
        for by_row, by_column, place, number in (
            ("columns", "rows", 3, 67),
            ("order", "slots", 7, 305),
            ("order", "slots", 3, -1),
            ("row_pointer", "column_pointer", 9, 1 << 20),
        ):
            case = small()
            x, values, index, dy = case.x(tokens), case.values, case.index, torch.ones(tokens, 67)
            getattr(index, by_row)[place] = number
            getattr(index, by_column)[place] = number
            with pytest.raises(IndexError, match="out of range"):
                native.product(x, values, index, 67)
            with pytest.raises(IndexError, match="out of range"):
                native.input_gradient(dy, values, index)
            with pytest.raises(IndexError, match="out of range"):
                native.values_gradient(x, dy, index)
    case = small()
    case.index.columns[3] = 41
    with pytest.raises(IndexError, match="out of range"):
        case.product("torch")(case.x(4), case.values)


def test_names_shapes_dtypes_and_promises_that_do_not_hold() -> None:
    case = small()
    x, values = case.x(4), case.values
    with pytest.raises(ValueError, match="expected 305 elements"):
        entry_matmul(x, values[1:], case.index, 67)
    with pytest.raises(ValueError, match="expected 41 features"):
        entry_matmul(x[:, :40], values, case.index, 67)
    with pytest.raises(ValueError, match=r"expected 41 features of torch\.float64"):
        entry_matmul(x, values.double(), case.index, 67)
    with pytest.raises(ValueError, match="do not ascend"):
        entry_index(case.entries, 67, 41, by_row=True)
