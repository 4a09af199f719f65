"""Condensed weights for inference."""

import pytest
import torch
from torch import Tensor

from padst_kernels.entries import Condensed, condense, condensed_matmul, native

# Outputs, inputs, entries in each row that has any, rows without entries.
SHAPES = [
    (67, 41, 5, 0),
    (67, 41, 41, 3),
    (33, 300, 17, 30),
    (1, 3, 1, 0),
    (48, 64, 8, 47),
    (48, 64, 8, 48),
]
FLOORS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Condensed, Tensor]:
    """A condensed weight with ragged rows and padding, and the same weight dense in float64."""
    out_features, in_features, count, num_dead = shape
    scores = torch.rand(out_features, in_features)
    kept = scores >= scores.topk(count, dim=1).values[:, -1:]
    kept[torch.randperm(out_features)[:num_dead]] = False
    kept[:, 0] &= torch.rand(out_features) < 0.5
    dense = torch.where(kept, torch.randn(out_features, in_features), 0.0).to(dtype)
    entries = kept.flatten().nonzero().squeeze(1)
    entries = entries[torch.randperm(len(entries))]
    values = torch.cat([dense.flatten()[entries], torch.ones(2, dtype=dtype)])
    entries = torch.cat([entries, torch.full((2,), dense.numel())])  # padding
    return condense(values, entries, out_features, in_features), dense.double()


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.functions():
        pytest.skip("no compiler")
    return request.param


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 16, 33, 70])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_dense_product(
    shape: tuple[int, ...], tokens: int, dtype: torch.dtype, backend: str
) -> None:
    weight, dense = make(shape, dtype)
    x = torch.randn(tokens, shape[1]).to(dtype)
    y = condensed_matmul(x, weight, backend=backend)
    expected = x.double() @ dense.T
    half_error = float((x @ dense.to(dtype).T - expected).norm())
    assert y.dtype == dtype and y.shape == expected.shape and y.is_contiguous()
    assert float((y - expected).norm()) <= max(2 * half_error, FLOORS[dtype] * expected.norm())


def test_rows_without_entries_take_no_storage() -> None:
    weight, dense = make((33, 300, 17, 30), torch.float32)
    assert len(weight.rows) == int(dense.any(dim=1).sum())
    assert len(weight.values) == int((dense != 0).sum())
    assert weight.columns.dtype == torch.uint16


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_half_of_the_neurons_removed(tokens: int, backend: str) -> None:
    """SRigL's ablation: those that stay keep their place, the others are zero."""
    weight, dense = make((200, 96, 9, 100), torch.float32)
    assert len(weight.rows) == 100
    x = torch.randn(tokens, 96)
    y = condensed_matmul(x, weight, backend=backend)
    torch.testing.assert_close(y, (x.double() @ dense.T).float())
    assert (y[:, ~dense.any(dim=1)] == 0).all()


def test_infinities_reach_only_the_rows_that_read_them(backend: str) -> None:
    weight, dense = make((67, 41, 5, 3), torch.float32)
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 41)
        x[:, 7] = torch.inf
        y = condensed_matmul(x, weight, backend=backend)
        assert torch.equal(y[0].isfinite(), dense[:, 7] == 0)


def test_takes_any_strides_and_leading_dimensions(backend: str) -> None:
    weight, dense = make((67, 41, 5, 3), torch.float32)
    x = torch.randn(41, 6, 5).permute(2, 1, 0)
    torch.testing.assert_close(condensed_matmul(x, weight, backend=backend), x @ dense.T.float())


def test_wide_inputs_use_wide_columns() -> None:
    entries = torch.tensor([3, 70_000, 70_000 + 69_999])
    weight = condense(torch.ones(3), entries, 2, 70_000)
    x = torch.arange(70_000.0)[None]
    assert condensed_matmul(x, weight, backend="native").tolist() == [[3.0, 69_999.0]]


@pytest.mark.parametrize("tokens", [1, 8, 40])
@pytest.mark.parametrize(
    ("field", "place", "number"),
    [
        ("columns", 3, 41),
        ("columns", -1, 65_535),
        ("rows", -1, 67),
        ("rows", 5, -1),
        ("row_pointer", 4, 1 << 20),
        ("row_pointer", -1, 1 << 20),
        ("row_pointer", 0, -1),
    ],
)
def test_an_index_out_of_range_is_an_error_not_a_crash(
    field: str, place: int, number: int, tokens: int
) -> None:
    if not native.functions():
        pytest.skip("no compiler")
    weight, _ = make((67, 41, 5, 3), torch.float32)
    getattr(weight, field)[place] = number
    with pytest.raises(IndexError, match="out of range"):
        condensed_matmul(torch.randn(tokens, 41), weight, backend="native")


def test_threads_change_no_bit() -> None:
    weight, _ = make((900, 300, 160, 20), torch.float32)
    for tokens in (1, 8, 40, 500):
        x = torch.randn(tokens, 300)
        single = condensed_matmul(x, weight, backend="native")
        torch.set_num_threads(2)
        try:
            double = condensed_matmul(x, weight, backend="native")
        finally:
            torch.set_num_threads(1)
        assert torch.equal(single, double)


def test_compiles_whole() -> None:
    weight, dense = make((67, 41, 5, 3), torch.float32)
    x = torch.randn(9, 41)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        return condensed_matmul(x, weight, backend="native").relu()

    with torch.no_grad():
        torch.testing.assert_close(run(x), (x @ dense.T.float()).relu())


def test_refuses_what_it_cannot_do() -> None:
    weight, _ = make((67, 41, 5, 3), torch.float32)
    with pytest.raises(ValueError, match="expected 41 features"):
        condensed_matmul(torch.randn(2, 40), weight, backend="native")
    with pytest.raises(ValueError, match="inference only"):
        condensed_matmul(torch.randn(2, 41, requires_grad=True), weight, backend="native")
