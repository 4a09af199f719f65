"""Activations of more than 2^31 elements; of their memory only what is read becomes real."""

import pytest
import torch
from torch import Tensor

from kernel_cases import DEVICE
from padst_kernels.diagonals.kernels import launch_diagonals, launch_diagonals_gradient
from padst_kernels.entries.kernels import launch_condensed
from padst_kernels.tiles import kernels

# Fits in 32 bits; three times as much does not.
STRIDE = (1 << 30) - 16


@pytest.fixture(params=["feature-major", "token-major"])
def activation(request: pytest.FixtureRequest) -> Tensor:
    """`[4, 4]`, standard normal, float16."""
    strides = (STRIDE, 1) if request.param == "feature-major" else (1, STRIDE)
    # Filled with NaN, all of it would become real.
    torch.use_deterministic_algorithms(False)
    memory = torch.empty(3 * STRIDE + 16, dtype=torch.float16, device=DEVICE)
    return memory.as_strided((4, 4), strides).copy_(torch.randn(4, 4))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value.float(), expected, rtol=1e-2, atol=1e-2)


def test_offsets_pass_32_bits(activation: Tensor) -> None:
    x, small = activation, activation.float()
    columns, weight = int32(3, 2, 1, 0).view(1, 4), torch.randn(1, 4, 8, device=DEVICE).half()
    y = kernels.launch_product(x, weight, columns, None, 8)
    assert_close(y, weight[0].float().t() @ small.flip(0))
    residual = kernels.launch_product(x, weight[..., :4].contiguous(), columns, None, 4, residual=x)
    assert_close(residual, weight[0, :, :4].float().t() @ small.flip(0) + small)
    dweight = kernels.launch_weight_gradient(x, x, columns, None, int32(2, 3, 1, 0), 4)
    assert_close(dweight[0], small.flip(0) @ small[[2, 3, 1, 0]].t())
    dx = kernels.launch_input_gradient(
        x, weight[..., :4].contiguous(), int32(3, 2, 1, 0).view(1, 4), int32(0, 1, 2, 3, 4),
        int32(3, 2, 1, 0), 4,
    )  # fmt: skip
    assert_close(dx, (weight[0, :, :4].float() @ small.flip(0)).flip(0))

    values, offsets = torch.randn(1, 4, device=DEVICE).half(), int32(1)
    assert_close(
        launch_diagonals(x, values, offsets, 4, by_row=True),
        values.float().t() * small.roll(-1, 0),
    )
    dvalues = launch_diagonals_gradient(x, x, offsets, by_row=True)
    assert_close(dvalues[0], (small * small.roll(-1, 0)).sum(1))
    y = launch_condensed(x, values[0], int32(3, 2, 1, 0), int32(0, 2, 4), int32(1, 0), 2)
    products = values[0].float()[:, None] * small.flip(0)
    assert_close(y, torch.stack([products[2:].sum(0), products[:2].sum(0)]))
