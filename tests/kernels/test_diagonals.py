"""Single diagonals: `diagonal_matmul` on every backend; interpreted Triton without a GPU."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from kernel_cases import DEVICE, activation, assert_agrees, dtypes_of, relative_error
from padst_kernels import Backend
from padst_kernels.diagonals import diagonal_matmul, diagonal_matmul_reference
from padst_kernels.diagonals.kernels import launch_diagonals, launch_diagonals_gradient

BACKENDS: list[Backend] = ["torch", "triton"]
SHAPES = [(40, 24), (24, 40), (33, 33)]  # outputs, inputs


@dataclass
class Case:
    """A weight `[O, I]` of four diagonals."""

    values: Tensor
    offsets: Tensor
    fold: dict[str, Tensor]
    shape: tuple[int, int]

    def product(self, backend: Backend) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, values: diagonal_matmul(
            x, values, self.offsets, self.shape[0], backend=backend, **self.fold
        )

    def reference(self, x: Tensor, values: Tensor) -> Tensor:
        return diagonal_matmul_reference(x, values, self.offsets, self.shape[0], **self.fold)

    def x(self, *tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*tokens, self.shape[1], device=DEVICE).to(dtype)


def make(shape: tuple[int, int], permuted: bool) -> Case:
    fold = {}
    if permuted:
        fold = {"columns": torch.randperm(shape[1]), "rows": torch.randperm(shape[0])}
    return Case(
        values=torch.randn(4, min(shape)).to(DEVICE),
        offsets=torch.randperm(max(shape))[:4].to(DEVICE, torch.int32),
        fold={name: t.to(DEVICE, torch.int32) for name, t in fold.items()},
        shape=shape,
    )


def test_the_reference_multiplies_with_the_diagonals_of_the_paper() -> None:
    for out_features, in_features in SHAPES:
        case = make((out_features, in_features), True)
        dense = torch.zeros(out_features, in_features)
        for offset, values in zip(case.offsets.tolist(), case.values, strict=True):
            for j, value in enumerate(values):
                row, column = (j + offset) % out_features, j
                if out_features < in_features:
                    row, column = j, (j + offset) % in_features
                dense[case.fold["rows"][row], case.fold["columns"][column]] = value
        x = torch.eye(in_features, device=DEVICE)
        assert torch.equal(case.reference(x, case.values), dense.to(DEVICE).t())


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(backend: Backend) -> None:
    for shape in SHAPES:
        for permuted in (False, True):
            case = make(shape, permuted)
            for tokens in ((), (5,), (3, 23)):
                assert_agrees(
                    case.product(backend), case.reference, case.x(*tokens), case.values,
                    about=(shape, permuted, tokens),
                )  # fmt: skip
        for dtype in dtypes_of(backend):
            x, values = case.x(5, dtype=dtype), case.values.to(dtype)
            assert_agrees(case.product(backend), case.reference, x, values, about=(shape, dtype))


def test_launchers_take_either_layout() -> None:
    for shape in SHAPES:
        case = make(shape, True)
        dense = case.reference(torch.eye(shape[1], device=DEVICE), case.values).t()
        offsets, by_row = case.offsets, shape[0] < shape[1]
        back = {"columns": case.fold["rows"], "rows": case.fold["columns"]}
        for tokens, feature_major in ((1, True), (37, True), (37, False)):
            x = activation(shape[1], tokens, feature_major)
            dy = activation(shape[0], tokens, not feature_major)
            y = launch_diagonals(
                x, case.values, offsets, shape[0], by_row=by_row,
                feature_major=not feature_major, **case.fold,
            )  # fmt: skip
            assert relative_error(y, dense @ x) < 1e-5
            dx = launch_diagonals(dy, case.values, offsets, shape[1], by_row=not by_row, **back)
            assert relative_error(dx, dense.T @ dy) < 1e-5
            dvalues = launch_diagonals_gradient(x, dy, offsets, by_row=by_row, **case.fold)
            values = case.values.clone().requires_grad_()
            expected = torch.autograd.grad(case.reference(x.t(), values), values, dy.t())[0]
            assert relative_error(dvalues, expected) < 1e-5


def test_one_compilation_serves_every_topology() -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=count)
    def run(x: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        return diagonal_matmul(x, values, offsets, 40, backend="triton").relu()

    kept = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        case = make((40, 24), False)
        kept.copy_(case.offsets)
        assert_agrees(
            lambda x, v: run(x, v, kept),
            lambda x, v, case=case: case.reference(x, v).relu(),
            case.x(5),
            case.values,
        )
    assert count.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_of_any_strides_and_no_diagonals(backend: Backend) -> None:
    case = make((24, 40), True)
    x, values = case.x(5), case.values.requires_grad_()
    results = []
    for loose in (False, True):
        indices = {"offsets": case.offsets, **case.fold}
        if loose:
            indices = {name: torch.stack([t, t], 1)[:, 0] for name, t in indices.items()}
        y = diagonal_matmul(x, values, out_features=24, backend=backend, **indices)
        results.append((y, *torch.autograd.grad(y.square().sum(), values)))
    for plain, strided in zip(*results, strict=True):
        assert torch.equal(plain, strided)

    none, x = values.detach()[:0].requires_grad_(), x.requires_grad_()
    y = diagonal_matmul(x, none, case.offsets[:0], 24, backend=backend)
    dx, dvalues = torch.autograd.grad(y, (x, none), torch.ones_like(y))
    assert (y == 0).all() and (dx == 0).all() and dvalues.shape == (0, 24)


@pytest.mark.gpu
def test_more_tokens_than_a_grid_has_tiles_along_its_second_axis() -> None:
    case = make((16, 24), False)
    x = case.x(16 * 65_536 + 5)
    y = case.product("triton")(x, case.values)
    torch.testing.assert_close(y[-20:], case.product("torch")(x[-20:], case.values))


def test_names_what_disagrees() -> None:
    case = make((40, 24), True)
    x, columns = case.x(5), case.fold["columns"]
    with pytest.raises(ValueError, match=r"values is \(4, 24\), expected \(4, 23\)"):
        diagonal_matmul(x[:, :23], case.values, case.offsets, 40)
    with pytest.raises(ValueError, match=r"rows is \(24,\), expected \(40,\)"):
        diagonal_matmul(x, case.values, case.offsets, 40, rows=columns)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        diagonal_matmul(x.double(), case.values, case.offsets, 40)
