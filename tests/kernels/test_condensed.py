"""Condensed weights for inference: `condense`, `condensed_matmul` on every backend."""

import pytest
import torch
import torch._dynamo
from torch import Tensor

from kernel_cases import DEVICE, activation, assert_agrees, dtypes_of, needs, relative_error
from padst_kernels import Backend
from padst_kernels.entries import (
    Condensed,
    condense,
    condensed_matmul,
    condensed_matmul_reference,
    kernels,
)

BACKENDS: list[Backend] = ["native", "torch", "triton"]
# Outputs, inputs, the most entries of a row, rows without entries.
SHAPES = [
    (67, 41, 5, 0),
    (67, 41, 41, 3),
    (17, 300, 140, 14),
    (1, 3, 2, 0),
    (48, 64, 8, 47),
    (48, 64, 8, 48),
]


def make(shape: tuple[int, ...]) -> tuple[Condensed, Tensor]:
    """A condensed weight with ragged rows and padding, and the same weight dense."""
    out_features, in_features, most, num_dead = shape
    counts = torch.randint(1, most + 1, (out_features,))
    counts[torch.randperm(out_features)[:num_dead]] = 0
    kept = torch.rand(out_features, in_features).argsort(1) < counts[:, None]
    dense = torch.where(kept, torch.randn(kept.shape), 0.0).to(DEVICE)
    entries = kept.flatten().nonzero().squeeze(1)
    entries = entries[torch.randperm(len(entries))].to(DEVICE)
    values = torch.cat([dense.flatten()[entries], dense.new_ones(2)])
    entries = torch.cat([entries, entries.new_full((2,), dense.numel())])  # padding
    return condense(values, entries, out_features, in_features), dense


def check(weight: Condensed, x: Tensor, backend: Backend, about: object = "") -> Tensor:
    """y, which must be that of the reference."""

    def product(x: Tensor) -> Tensor:
        return condensed_matmul(
            x, weight._replace(values=weight.values.to(x.dtype)), backend=backend
        )

    def reference(x: Tensor) -> Tensor:
        values = weight.values.to(first).to(x.dtype)
        return condensed_matmul_reference(x, weight._replace(values=values))

    first = x.dtype
    (y,) = assert_agrees(product, reference, x, backward=False, about=about)
    assert y.is_contiguous()
    return y


def test_a_condensed_weight_holds_what_is_not_padding_and_no_rows_without_entries() -> None:
    for shape in SHAPES:
        weight, dense = make(shape)
        assert torch.equal(
            condensed_matmul_reference(torch.eye(shape[1]).to(DEVICE), weight), dense.t()
        )
        assert len(weight.rows) == int(dense.any(dim=1).sum())
        assert len(weight.values) == int((dense != 0).sum())
        assert weight.columns.dtype == torch.uint16


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(backend: Backend) -> None:
    needs(backend)
    # Fewer in the interpreter.
    many = (1, 33) if backend == "triton" else (0, 1, 2, 8, 16, 33, 70)
    for shape in SHAPES:
        weight, dense = make(shape)
        for tokens in many:
            for dtype in dtypes_of(backend)[tokens == 33 and backend == "triton" :]:
                x = torch.randn(tokens, shape[1], device=DEVICE).to(dtype)
                y = check(weight, x, backend, (shape, tokens, dtype))
                # Neurons that were removed keep their place.
                assert (y[:, ~dense.any(dim=1)] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_strides_and_leading_dimensions(backend: Backend) -> None:
    needs(backend)
    weight, dense = make(SHAPES[0])
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 41, device=DEVICE)
        x[:, 7] = torch.inf
        # They reach only the rows that read them.
        y = condensed_matmul(x, weight, backend=backend)
        assert torch.equal(y[0].isfinite(), dense[:, 7] == 0)
    for x in (torch.randn(41, 6, 5).permute(2, 1, 0), torch.randn(41), torch.randn(2, 0, 41)):
        check(weight, x.to(DEVICE), backend)


def test_wide_inputs_use_wide_columns() -> None:
    entries = torch.tensor([3, 70_000, 70_000 + 69_999], device=DEVICE)
    weight = condense(torch.ones(3, device=DEVICE), entries, 2, 70_000)
    x = torch.arange(70_000.0, device=DEVICE)[None]
    for backend in BACKENDS if DEVICE == "cpu" else BACKENDS[1:]:
        assert condensed_matmul(x, weight, backend=backend).tolist() == [[3.0, 69_999.0]]


def test_an_index_out_of_range_is_an_error_not_a_crash() -> None:
    needs("native")
    for tokens in (1, 8, 40):
        for field, place, number in (
            ("columns", 3, 41),
            ("columns", -1, 65_535),
            ("rows", -1, 67),
            ("rows", 5, -1),
            ("row_pointer", 4, 1 << 20),
            ("row_pointer", -1, 1 << 20),
            ("row_pointer", 0, -1),
        ):
            weight, _ = make((67, 41, 5, 3))
            getattr(weight, field)[place] = number
            with pytest.raises(IndexError, match="out of range"):
                condensed_matmul(torch.randn(tokens, 41), weight, backend="native")


def test_threads_change_no_bit() -> None:
    needs("native")
    weight, _ = make((900, 300, 160, 20))
    for tokens in (1, 8, 40, 500):
        x = torch.randn(tokens, 300)
        single = condensed_matmul(x, weight, backend="native")
        torch.set_num_threads(2)
        try:
            assert torch.equal(condensed_matmul(x, weight, backend="native"), single)
        finally:
            torch.set_num_threads(1)


def test_compiles_whole() -> None:
    weight, dense = make((67, 41, 5, 3))
    x = torch.randn(9, 41, device=DEVICE)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return condensed_matmul(x, weight, backend="torch").relu()

    with torch.no_grad():
        torch.testing.assert_close(run(x), (x @ dense.T).relu())


def test_refuses_what_it_cannot_do() -> None:
    weight, _ = make((67, 41, 5, 3))
    with pytest.raises(ValueError, match="expected 41 features"):
        condensed_matmul(torch.randn(2, 40, device=DEVICE), weight)
    with pytest.raises(ValueError, match="inference only"):
        condensed_matmul(torch.randn(2, 41, device=DEVICE, requires_grad=True), weight)


# --- the Triton kernel alone ---


def test_the_kernel_reads_either_layout_and_nothing_behind_the_arrays() -> None:
    for count in (*range(40, 49), 7):
        entries = torch.randperm(6 * 20)[:count].sort().values
        weight = condense(torch.randn(count), entries, 6, 20)
        values = torch.cat([weight.values, torch.full((8,), torch.nan)]).to(DEVICE)[:count]
        columns = torch.cat([weight.columns.int(), torch.full((8,), 1 << 30)]).int()
        index = columns.to(DEVICE)[:count], weight.row_pointer.to(DEVICE), weight.rows.to(DEVICE)
        dense = torch.zeros(120).scatter(0, entries, weight.values).view(6, 20).to(DEVICE)
        for feature_major in (True, False):
            x = activation(20, 3, feature_major)
            y = kernels.launch_condensed(x, values, *index, 6)
            assert relative_error(y, dense @ x) < 1e-6
            assert y.t().is_contiguous()


def test_columns_out_of_range_count_for_nothing() -> None:
    weight, dense = make(SHAPES[0])
    columns = weight.columns.int()
    dense[int(weight.rows[0]), int(columns[0])] = 0
    columns[0] = 41
    x = activation(41, 5)
    y = kernels.launch_condensed(x, weight.values, columns, *weight[2:4], 67)
    assert relative_error(y, dense @ x) < 1e-6
