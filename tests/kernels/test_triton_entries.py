"""The Triton kernel of condensed weights against dense float64; interpreted without a GPU."""

import pytest
import torch
from torch import Tensor

from padst_kernels.activations import empty_features
from padst_kernels.entries import Condensed, condense, condensed_matmul, kernels, passes

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Outputs, inputs, the most entries of a row, rows without entries.
SHAPES = [(67, 41, 5, 0), (33, 300, 140, 30), (1, 3, 2, 0), (48, 64, 8, 47), (16, 70, 70, 0)]


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Condensed, Tensor]:
    """Rows of any length, and the same weight dense in float64."""
    out_features, in_features, most, num_dead = shape
    counts = torch.randint(1, most + 1, (out_features,))
    counts[torch.randperm(out_features)[:num_dead]] = 0
    ranks = torch.rand(out_features, in_features).argsort(1)
    kept = ranks < counts[:, None]
    dense = torch.where(kept, torch.randn(ranks.shape), 0.0).to(dtype)
    entries = kept.flatten().nonzero().squeeze(1)
    weight = condense(dense.flatten()[entries], entries, out_features, in_features)
    tensors = (t.to(DEVICE) if isinstance(t, Tensor) else t for t in weight)
    return Condensed(*tensors), dense.double()


def activation(
    num_features: int, num_tokens: int, feature_major: bool, dtype: torch.dtype
) -> Tensor:
    """Standard normal, with NaN in the padding."""
    like = torch.empty(0, device=DEVICE, dtype=dtype)
    x = empty_features(num_features, num_tokens, like, feature_major)
    return x.copy_(torch.randn(num_features, num_tokens))


def assert_close(value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (value.double().cpu() - expected).norm() / expected.norm()
    assert error < TOLERANCES[dtype], float(error)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("feature_major", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 16, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_dense_product(
    shape: tuple[int, ...], tokens: int, feature_major: bool, dtype: torch.dtype
) -> None:
    weight, dense = make(shape, dtype)
    x = activation(shape[1], tokens, feature_major, dtype)
    y = kernels.launch_condensed(x, *weight[:4], shape[0])
    assert y.dtype == dtype and y.t().is_contiguous()
    assert_close(y, dense @ x.double().cpu(), dtype)
    assert (y[~dense.any(1).to(DEVICE)] == 0).all()


@pytest.mark.parametrize("num_entries", range(40, 49))
def test_entries_beyond_the_last_whole_vector(num_entries: int) -> None:
    entries = torch.randperm(6 * 20)[:num_entries].sort().values
    weight = condense(torch.randn(num_entries), entries, 6, 20)
    # What stands behind the arrays is not touched.
    values = torch.cat([weight.values, torch.full((8,), torch.nan)]).to(DEVICE)[:num_entries]
    columns = torch.cat([weight.columns.int(), torch.full((8,), 1 << 30)]).int()
    columns = columns.to(DEVICE)[:num_entries]
    x = activation(20, 3, True, torch.float32)
    y = kernels.launch_condensed(
        x, values, columns, weight.row_pointer.to(DEVICE), weight.rows.to(DEVICE), 6
    )
    dense = torch.zeros(120, dtype=torch.float64).scatter(0, entries, weight.values.double())
    assert_close(y, dense.view(6, 20) @ x.double().cpu(), torch.float32)


def test_infinities_reach_only_the_rows_that_read_them() -> None:
    weight, dense = make(SHAPES[0], torch.float32)
    x = activation(41, 5, True, torch.float32)
    x[7] = torch.inf
    y = kernels.launch_condensed(x, *weight[:4], 67)
    assert torch.equal(y[:, 0].isfinite().cpu(), dense[:, 7] == 0)


def test_columns_out_of_range_count_for_nothing() -> None:
    weight, dense = make(SHAPES[0], torch.float32)
    columns = weight.columns.int()
    dense[0, int(columns[0])] = 0
    columns[0] = 41
    x = activation(41, 5, True, torch.float32)
    y = kernels.launch_condensed(x, weight.values, columns, *weight[2:4], 67)
    assert_close(y, dense @ x.double().cpu(), torch.float32)


def test_nothing_to_do() -> None:
    weight, _ = make(SHAPES[0], torch.float32)
    assert kernels.launch_condensed(torch.randn(41, 0), *weight[:4], 67).shape == (67, 0)
    none = condense(torch.empty(0), torch.empty(0, dtype=torch.int64), 5, 41)
    assert (kernels.launch_condensed(torch.randn(41, 1), *none[:4], 5) == 0).all()


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (70,)])
def test_linear_by_this_backend(leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    launch = kernels.launch_condensed
    monkeypatch.setattr(kernels, "launch_condensed", lambda *a: calls.append(1) or launch(*a))
    weight, dense = make(SHAPES[1], torch.float32)
    x = torch.randn(*leading, 300, device=DEVICE)
    y = condensed_matmul(x, weight, backend="triton")
    assert y.shape == (*leading, 33) and y.is_contiguous()
    assert_close(y, x.double().cpu() @ dense.T, torch.float32)
    # Many tokens go another way.
    assert len(calls) == (x.numel() // 300 <= passes.MAX_TRITON_TOKENS)


def test_float64_goes_to_pytorch() -> None:
    weight, dense = make(SHAPES[0], torch.float64)
    x = torch.randn(2, 41, dtype=torch.float64, device=DEVICE)
    y = condensed_matmul(x, weight, backend="triton")
    torch.testing.assert_close(y.cpu(), x.cpu() @ dense.T)


def test_names_a_backend_that_does_not_exist() -> None:
    weight, _ = make(SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match="backend is 'gpu', expected one of"):
        condensed_matmul(torch.randn(3, 41, device=DEVICE), weight, backend="gpu")
