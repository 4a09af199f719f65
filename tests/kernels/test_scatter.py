import torch

from kernel_cases import assert_agrees
from padst_kernels.scatter import scatter_matmul, scatter_matmul_reference


def test_equals_the_reference_and_ignores_padding() -> None:
    entries = torch.tensor([[0, 13], [34, 7], [20, 35], [35, 35]])  # 35 = 7 * 5: padding
    dense = scatter_matmul_reference(torch.eye(5), torch.arange(1.0, 9).view(4, 2), entries, 7).t()
    assert dense.flatten().nonzero().flatten().tolist() == [0, 7, 13, 20, 34]
    assert dense.flatten()[[0, 7, 13, 20, 34]].tolist() == [1, 4, 2, 5, 3]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for index in (entries, entries.int()):
            for tokens in ((), (9,), (2, 0), (2, 3)):
                _, _, dvalues = assert_agrees(
                    lambda x, v, index=index: scatter_matmul(x, v, index, 7),
                    lambda x, v: scatter_matmul_reference(x, v, entries, 7),
                    torch.randn(*tokens, 5).to(dtype),
                    torch.randn(4, 2).to(dtype),
                )
                assert (dvalues[entries == 35] == 0).all()
