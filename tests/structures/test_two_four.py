"""2:4 for sparse tensor cores: what of it a machine without them can tell."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from dst.small_training import start
from from_yaml import from_yaml
from padst_exp import dispatch
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import NM, Block, FanIn, Geometry, Unstructured
from padst_exp.structures.product import (
    SemiStructuredProduct,
    can_be_two_four,
    is_two_four,
)


def layer(group: int = 1, *, side: Any = "in", rows: int = 96) -> SparseLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, rows), nn.Linear(rows, 8))
    structure, learner = NM(n=2, m=4, group=group), RandomPermutation(side=side)
    sparsify(model, [Rule("0", 3)], structure=structure, density=0.5, learner=learner)
    assert isinstance(model[0], SparseLinear)
    return model[0]


def through_the_compressed_layout(dense: Tensor) -> Tensor:
    return sparse_semi_structured_to_dense_cutlass(
        *sparse_semi_structured_from_dense_cutlass(dense)
    )


def test_packed_values_are_the_compressed_ones_of_pytorch() -> None:
    for weight in layer().parts():
        dense = weight.matrix().detach().bfloat16()
        compressed, _ = sparse_semi_structured_from_dense_cutlass(dense)
        assert torch.equal(compressed, weight.values.detach().bfloat16().view(32, 64))
        assert torch.equal(through_the_compressed_layout(dense), dense)


@pytest.mark.parametrize(("group", "side"), [(1, "in"), (16, "out"), (32, "both")])
def test_the_product_is_that_of_a_dense_weight(
    group: int, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", through_the_compressed_layout)
    plain, ours = layer(group, side=side), layer(group, side=side)
    ours.products = nn.ModuleList([SemiStructuredProduct()])
    ours._parts = [slice(0, 3)]
    ours.index()
    assert ours.products[0].fits
    both = []
    for one in (plain, ours):
        x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        x.requires_grad_()
        y = one.bfloat16()(x)
        values = [weight.values for weight in one.parts()]
        both.append([y, *torch.autograd.grad(y.square().sum(), (x, *values))])
    for theirs, mine in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=3e-1)
        assert (mine - theirs).norm() < 1e-2 * theirs.norm()


def test_what_is_no_more_2_4_multiplies_densely() -> None:
    training = start(from_yaml("dst/gmp", interval=2), NM(n=2, m=4, group=1), steps=20, density=0.5)
    found = []
    for _ in range(20):
        weight = copy.deepcopy(training.model[0]).parts()[0]  # type: ignore[index, operator]
        found.append(is_two_four(weight.entries()))
        assert found[-1] == (weight.topology().density == 0.5)
        training.run(1)
    assert not found[0] and found[-1]


def test_which_geometries_may() -> None:
    def geometry(
        structure: Any, rows: int = 64, columns: int = 128, density: float = 0.5
    ) -> Geometry:
        made: Geometry = structure.geometry(rows, columns, density)
        return made

    assert can_be_two_four(geometry(NM(n=2, m=4, group=1)))
    assert can_be_two_four(geometry(NM(n=2, m=4, group=16)))
    assert can_be_two_four(geometry(NM(n=1, m=2, group=1)))
    for other in (
        geometry(NM(n=1, m=None, group=1), density=0.1),
        geometry(NM(n=4, m=8, group=1)),
        geometry(NM(n=2, m=4, group=1), rows=48),
        geometry(NM(n=2, m=4, group=1), columns=96),
        geometry(NM(n=2, m=4, group=24)),
        geometry(FanIn(group=1)),
        geometry(Block(size=4, balanced=False)),
        geometry(Unstructured()),
    ):
        assert not can_be_two_four(other)


def test_elsewhere_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"^backend: expected one for this device, a CPU [^\n]*, got semi_structured$"
    with pytest.raises(UserError, match=message):
        dispatch.forced(layer(), "semi_structured", torch.device("cpu"))
    # On a GPU that has no such layer, or is too old.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    message = r"^backend: expected one that a layer has: [^\n]* 8\.0 or more, got semi_structured$"
    with pytest.raises(UserError, match=message):
        dispatch.forced(layer(), "semi_structured", torch.device("cuda"))
    assert "semi_structured" not in layer().backends(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "semi_structured" in layer().backends(torch.device("cuda"))
    assert "semi_structured" not in layer(rows=99).backends(torch.device("cuda"))
