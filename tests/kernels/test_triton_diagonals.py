"""Single diagonals on the Triton kernels, against dense float64."""

import pytest
import torch
from torch import Tensor

from padst_kernels.diagonals.kernels import launch_diagonals, launch_diagonals_gradient
from padst_kernels.gather_gemm.layout import empty_features

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
