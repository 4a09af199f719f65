import pytest
import torch

from padst_kernels.gather_gemm import gather_gemm, gather_gemm_reference
from padst_kernels.scatter_linear import scatter_linear

SHAPES = [
    # tokens, inputs, tiles, width, height, row groups, outputs
    (1, 7, 3, 2, 4, 3, 12),
    (5, 33, 6, 5, 8, 3, 21),
    (63, 40, 9, 8, 16, 4, 64),
    (200, 17, 4, 17, 1, 4, 4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_gather_gemm_equals_the_dense_product(shape: tuple[int, ...], permuted: bool) -> None:
    tokens, inputs, tiles, width, height, groups, outputs = shape
    x = torch.randn(tokens, inputs, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(tiles, width, height, dtype=torch.float64, requires_grad=True)
    columns = torch.stack([torch.randperm(inputs)[:width] for _ in range(tiles)])
    owner = None if tiles == groups else torch.randint(0, groups, (tiles,))
    positions = torch.randperm(groups * height)[:outputs] if permuted else None
    arguments = (columns, owner, positions, groups, outputs)

    y = gather_gemm(x, weight, *arguments)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, weight), dy)
    reference = gather_gemm_reference(x, weight, *arguments)
    reference_grads = torch.autograd.grad(reference, (x, weight), dy)
    torch.testing.assert_close(y, reference)
    for grad, expected in zip(grads, reference_grads, strict=True):
        torch.testing.assert_close(grad, expected)


def test_gather_gemm_keeps_leading_dimensions() -> None:
    weight, columns = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [4, 3, 0]])
    x = torch.randn(2, 6, 5)
    y = gather_gemm(x, weight, columns, None, None, 2, 8)
    assert y.shape == (2, 6, 8)
    flat = gather_gemm(x.flatten(0, 1), weight, columns, None, None, 2, 8)
    torch.testing.assert_close(y.flatten(0, 1), flat)


def test_gather_gemm_names_shapes_that_disagree() -> None:
    with pytest.raises(ValueError, match=r"columns is \(2, 3\)"):
        gather_gemm(
            torch.randn(4, 5), torch.randn(2, 2, 4), torch.zeros(2, 3).long(), None, None, 2, 8
        )


def test_scatter_linear_equals_the_dense_product_and_ignores_padding() -> None:
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    entries = torch.tensor([[0, 13], [34, 7], [20, 35], [35, 35]])  # 35 = 7 * 5: padding
    inside = entries.flatten() < 35

    y = scatter_linear(x, values, entries, 7)
    dense = torch.zeros(35, dtype=torch.float64)
    dense = dense.index_put((entries.flatten()[inside],), values.flatten()[inside])
    reference = x @ dense.view(7, 5).T
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, reference)
    for grad, expected in zip(
        torch.autograd.grad(y, (x, values), dy),
        torch.autograd.grad(reference, (x, values), dy),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected)
