import torch

from padst_kernels.scatter import scatter_matmul


def test_equals_the_dense_product_and_ignores_padding() -> None:
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    entries = torch.tensor([[0, 13], [34, 7], [20, 35], [35, 35]])  # 35 = 7 * 5: padding
    inside = entries.flatten() < 35

    y = scatter_matmul(x, values, entries, 7)
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
