"""2:4 by the sparse tensor cores of a GPU, against the same product by dense ones."""

import copy

import pytest
import torch
from torch import nn

from padst_exp.layers import SparseLinear
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import NM


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 50, 197])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_and_its_gradients_are_those_of_a_dense_weight(
    tokens: int, dtype: torch.dtype
) -> None:
    for group, side in ((1, "in"), (16, "out")):
        model = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 8))
        sparsify(
            model, [Rule("0")], structure=NM(n=2, m=4, group=group), density=0.5,
            learner=RandomPermutation(side=side),  # type: ignore[arg-type]
        )  # fmt: skip
        layer = model[0].to("cuda", dtype)
        assert isinstance(layer, SparseLinear)
        assert "semi_structured" in layer.backends(torch.device("cuda"))
        x = torch.randn(tokens, 768, device="cuda", dtype=dtype, requires_grad=True)
        dy = torch.randn(tokens, 3072, device="cuda", dtype=dtype)
        results = []
        for backend in ("scatter", "semi_structured"):
            own = copy.deepcopy(layer)
            own.use_backend(backend)  # type: ignore[arg-type]
            y = own(x)
            results.append([y, *torch.autograd.grad(y, (x, own.parts()[0].values), dy)])
        for theirs, ours in zip(*results, strict=True):
            assert (ours - theirs).norm() <= 1e-2 * theirs.norm()
