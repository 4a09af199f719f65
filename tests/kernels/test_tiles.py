"""`tile_matmul` and `tile_index` on every backend; interpreted Triton where there is no GPU."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_cases import (
    DEVICE,
    FLOORS,
    TILES,
    assert_agrees,
    blocks,
    dtypes_of,
    make_tiles,
    needs,
    random_tiles,
    vector_nm,
)
from padst_kernels import Backend
from padst_kernels.tiles import TileIndex, native, tile_index, tile_matmul
from padst_kernels.tiles.reference import dense_weight

ON_CPU: list[Backend] = ["native", "torch"]
BACKENDS: list[Backend] = [*ON_CPU, "triton"]

# Tokens; inputs, tiles, width, height, row groups, outputs.
SHAPES = [
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


def test_the_reference_multiplies_with_the_weight_that_the_index_was_made_for() -> None:
    cases = [TILES[name](permuted) for name in TILES for permuted in (False, True)]
    cases += [random_tiles(*shape[1:], permuted=True) for shape in SHAPES]
    for case in cases:
        assert torch.equal(dense_weight(case.weight, case.index, case.shape[0]), case.dense())


def check_shapes(backend: Backend, dtype: torch.dtype) -> None:
    for tokens, *shape in SHAPES:
        for permuted in (False, True):
            case = random_tiles(*shape, permuted=permuted)
            x, weight = case.x(tokens, dtype=dtype), case.weight.to(dtype)
            ours = assert_agrees(
                case.product(backend), case.reference, x, weight, about=(tokens, shape, permuted)
            )
            if backend == "native" and dtype.itemsize == 2:
                # Sums are in float32 and rounded once: half a unit in the last place.
                exact = case.reference(x.double(), weight.double())
                unit = torch.finfo(dtype).eps / 2
                allowed = unit * exact.abs() + 1e-6 * exact.norm()
                assert ((ours[0].double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
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
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    inputs, groups, height = draw(1, 70), draw(1, 5), draw(1, 40)
    case = random_tiles(
        inputs,
        draw(1, 8),
        draw(1, inputs),
        height,
        groups,
        draw(1, groups * height),
        permuted=data.draw(st.booleans()),
    )
    dtype = data.draw(st.sampled_from(list(FLOORS)))
    backend = data.draw(st.sampled_from(ON_CPU if DEVICE == "cpu" else ON_CPU[1:]))
    x = case.x(draw(0, 70), dtype=dtype)
    assert_agrees(case.product(backend), case.reference, x, case.weight.to(dtype))


@pytest.mark.parametrize("name", TILES)
def test_equals_the_reference_on_triton(name: str) -> None:
    for permuted, tokens in ((False, 5), (True, 1), (True, 67)):
        case = TILES[name](permuted)
        x, weight = case.x(tokens), case.weight
        assert_agrees(case.product("triton"), case.reference, x, weight, about=(permuted, tokens))
    for dtype in dtypes_of("triton")[2:]:
        x, weight = case.x(9, dtype=dtype), case.weight.to(dtype)
        assert_agrees(case.product("triton"), case.reference, x, weight, about=dtype)


def test_a_wrong_native_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("native")
    case = random_tiles(33, 6, 5, 8, 3, 21, permuted=True)
    x = case.x(9)
    assert_agrees(case.product("native"), case.reference, x, case.weight)
    for name in ("product", "input_gradient", "weight_gradient"):
        right = getattr(native, name)
        with monkeypatch.context() as patch:
            patch.setattr(native, name, lambda *a, right=right: right(*a) * 1.01)
            with pytest.raises(AssertionError, match=r"y|gradient"):
                assert_agrees(case.product("native"), case.reference, x, case.weight)


def test_what_no_column_reads_leaks_nowhere() -> None:
    needs("native")
    for backend in ON_CPU:
        for tokens, dtype in ((1, torch.float32), (40, torch.float32), (40, torch.bfloat16)):
            case = random_tiles(33, 6, 5, 32, 3, 90, permuted=True)
            unread = torch.ones(34, dtype=torch.bool)
            unread[case.columns.flatten()] = False
            assert unread[:33].any()
            x, weight = case.x(tokens, dtype=dtype), case.weight.to(dtype).requires_grad_()
            x[:, unread[:33]] = torch.nan
            results = []
            for inputs in (x.requires_grad_(), x.detach().nan_to_num(0).requires_grad_()):
                y = case.product(backend)(inputs, weight)
                results.append((y, *torch.autograd.grad(y, (inputs, weight), torch.ones_like(y))))
            for poisoned, clean in zip(*results, strict=True):
                assert torch.equal(poisoned, clean), (backend, tokens, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_any_strides_and_leading_dimensions(backend: Backend) -> None:
    needs(backend)
    case = random_tiles(33, 6, 5, 8, 3, 21, permuted=True)
    weight = case.weight.transpose(1, 2).contiguous().transpose(1, 2)
    x = case.x(60).t().contiguous().t().view(5, 12, 33)
    dy = torch.randn(21, 12, 5, device=DEVICE).permute(2, 1, 0)
    assert_agrees(case.product(backend), case.reference, x, weight, dy=dy)
    # And the columns that an index is made of.
    columns = torch.stack([torch.randperm(45)[:13] for _ in range(3)])
    options = {"height": 16, "num_row_groups": 3, "in_features": 45, "out_features": 44}
    x, weight = torch.randn(5, 45, device=DEVICE), torch.randn(3, 13, 16, device=DEVICE)
    results = []
    for these in (columns, columns.t().contiguous().t()):
        index = tile_index(these.to(DEVICE), None, None, **options)
        results.append(tile_matmul(x, weight, index, 44, backend=backend))
    assert torch.equal(*results)


def test_threads_change_no_bit() -> None:
    needs("native")
    for tokens, *shape in ((500, 128, 8, 40, 64, 8, 512), (8, 300, 16, 257, 80, 16, 1280)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            case = random_tiles(*shape, permuted=True)
            x = case.x(tokens, dtype=dtype).requires_grad_()
            weight = case.weight.to(dtype).requires_grad_()

            def run(case=case, x=x, weight=weight) -> tuple[Tensor, ...]:  # noqa: ANN001
                y = case.product("native")(x, weight)
                return y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))

            single = run()
            try:
                for threads in (2, 5):
                    torch.set_num_threads(threads)
                    for one, several in zip(single, run(), strict=True):
                        assert torch.equal(one, several)
            finally:
                torch.set_num_threads(1)


def test_names_what_disagrees() -> None:
    case = random_tiles(33, 6, 5, 8, 3, 21, permuted=False)
    x, weight, index = case.x(4), case.weight, case.index
    with pytest.raises(ValueError, match=r"columns is \(6, 5\)"):
        tile_matmul(x, weight[:, :3], index, 21)
    with pytest.raises(ValueError, match="expected 33 features"):
        tile_matmul(x[:, :32], weight, index, 21)
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        tile_matmul(x, weight.double(), index, 21)
    with pytest.raises(ValueError, match="out_features is 25, the index has 24 rows"):
        tile_matmul(x, weight, index, 25)


def test_an_index_out_of_range_is_an_error_not_a_crash() -> None:
    needs("native")
    for tokens in (1, 40):
        for field, place, number in (
            ("columns", 13, 34),
            ("columns", -1, -1),
            ("rows", 0, 1000),
            ("rows", -1, -5),
            ("row_pointer", 1, 1000),
            ("row_pointer", 0, -1),
            ("order", 0, 99),
            ("order", -1, -1),
        ):
            case = random_tiles(33, 6, 5, 8, 3, 21, permuted=True)
            x, weight, dy = case.x(tokens), case.weight, torch.ones(tokens, 21)
            getattr(case.index, field).view(-1)[place] = number
            for run in (
                lambda: native.product(x, weight, case.index, 21),  # noqa: B023
                lambda: native.input_gradient(dy, weight, case.index),  # noqa: B023
                lambda: native.weight_gradient(x, dy, case.index, 8),  # noqa: B023
            ):
                with pytest.raises(IndexError, match="out of range"):
                    run()
    case = random_tiles(33, 6, 5, 8, 3, 21, permuted=False)
    case.index.columns[2, 3] = 34
    with pytest.raises(IndexError, match="out of range"):
        tile_matmul(case.x(40), case.weight, case.index, 21, backend="torch")


def test_shapes_of_an_index_do_not_depend_on_the_topology() -> None:
    for name, make in TILES.items():
        first, second = (
            [None if t is None else t.shape for t in make(True).index] for _ in range(2)
        )
        assert first == second, name
    for permuted in (False, True):
        index = blocks((40, 67), 8, permuted).index
        assert index.slots is None and index.tile_rows is None
        assert index.column_run == (1 if permuted else 8)


def test_columns_that_are_no_partition_are_refused() -> None:
    columns = torch.arange(16).view(2, 8)
    options = {"height": 8, "num_row_groups": 2, "in_features": 16, "out_features": 16}
    index = tile_index(columns, None, None, **options, num_column_groups=2)
    assert index.transposed_order is not None
    for wrong in (columns.flip(1), columns + 1, torch.randperm(16).view(2, 8)):
        with pytest.raises(ValueError, match="the 8 columns of a tile are not one of 2 groups"):
            tile_index(wrong, None, None, **options, num_column_groups=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_of_padding_alone_change_nothing_and_no_tiles_are_zero(backend: Backend) -> None:
    needs(backend)
    columns, owner = torch.arange(16).view(2, 8).clamp(max=15), torch.tensor([0, 1])
    options = {"height": 8, "num_row_groups": 2, "permuted": False}
    few = make_tiles(columns, owner, (16, 15), num_column_groups=2, **options)
    columns, owner = torch.cat([columns, torch.full((1, 8), 15)]), torch.tensor([0, 1, 0])
    more = make_tiles(columns, owner, (16, 15), num_column_groups=2, **options)
    weight, x = torch.randn(3, 8, 8, device=DEVICE), few.x(5).requires_grad_()
    results = []
    for tiles, case in ((weight[:2], few), (weight, more)):
        y = case.product(backend)(x, tiles)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*results)

    for num_column_groups in (None, 2):
        none = torch.empty(0, dtype=torch.int64)
        case = make_tiles(
            none.view(0, 8), none, (16, 15), num_column_groups=num_column_groups, **options
        )
        weight = torch.empty(0, 8, 8, device=DEVICE, requires_grad=True)
        y = case.product(backend)(x, weight)
        dx, dweight = torch.autograd.grad(y, (x, weight), torch.randn_like(y))
        assert y.shape == (5, 16) and (y == 0).all()
        assert dx.shape == (5, 15) and (dx == 0).all() and dweight.shape == (0, 8, 8)


def test_float32_is_as_precise_as_pytorch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from padst_kernels.tiles import kernels

    asked: list[str] = []
    launch: Callable[..., Tensor] = kernels.launch_product

    def launch_product(*args: object, precision: str, **options: object) -> Tensor:
        asked.append(precision)
        return launch(*args, **options)

    monkeypatch.setattr(kernels, "launch_product", launch_product)
    case, matmul = vector_nm(False), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    x, run = case.x(5), case.product("triton")
    try:
        for matmul.fp32_precision in ("tf32", "ieee"):
            run(x, case.weight)
            run(x.half(), case.weight.half())
        torch.set_float32_matmul_precision("high")
        run(x, case.weight)
    finally:
        matmul.fp32_precision = before
    assert asked == ["tf32", "ieee", "ieee", "ieee", "tf32"]


def test_an_index_survives_new_topologies_in_compiled_code() -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count)
    def run(x: Tensor, weight: Tensor, index: TileIndex) -> Tensor:
        return tile_matmul(x, weight, index, 40, backend="triton").relu()

    first = blocks((40, 67), 8, True)
    for _ in range(2):
        case = blocks((40, 67), 8, True)
        for old, new in zip(first.index, case.index, strict=True):
            assert (old is None) == (new is None)
            if old is not None and new is not None:
                old.copy_(new)
        assert_agrees(
            lambda x, w: run(x, w, first.index),
            lambda x, w, case=case: case.reference(x, w).relu(),
            case.x(5),
            case.weight,
        )
    assert count.frame_count == 1
