import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from padst_exp.dst import DropGrow, Gradient, Magnitude
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear, permutations, sparse_weights
from padst_exp.permutations import DoublyStochastic, RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Backend, Storage, gather_entries
from structure_cases import CASE_IDS, CASES, STRUCTURES

Life = Literal["none", "random", "soft", "hardened"]
RIGL = DropGrow(
    drop=Magnitude(), grow=Gradient(), fraction=0.6, interval=1, stop=1.0, moments="age"
)


def layer(
    name: str,
    shape: tuple[int, int],
    storage: Storage,
    life: Life,
    dtype: torch.dtype,
    split: int = 1,
) -> SparseLinear:
    """The same layer for the same arguments, whatever the storage."""
    torch.manual_seed(0)
    rows, columns = shape
    model = nn.Sequential(nn.Linear(columns, rows))
    learner = {
        "none": None,
        "random": RandomPermutation(side="both"),
        "soft": DoublyStochastic(side="both"),
        "hardened": DoublyStochastic(side="both"),
    }[life]
    sparsify(
        model,
        [Rule("0", split)],
        structure=STRUCTURES[name],
        density=0.25,
        learner=learner,
        storage=storage,
    )
    model.to(dtype)
    sparse = model[0]
    assert isinstance(sparse, SparseLinear)
    if life == "hardened":
        for permutation in permutations(sparse).values():
            permutation.harden()
    return sparse


def explicit_product(sparse: SparseLinear, x: Tensor, weight: Tensor) -> Tensor:
    """P_out S P_in x + b, step by step."""
    if sparse.input_permutation is not None:
        x = x @ sparse.input_permutation.matrix().to(x.dtype).T
    y = x @ weight.T
    output = sparse.output_permutations[0]
    if not isinstance(output, nn.Identity):
        y = y @ output.matrix().to(y.dtype).T  # type: ignore[operator]
    assert sparse.bias is not None
    return y + sparse.bias


def run(sparse: SparseLinear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Outputs and every gradient, those of values per active entry."""
    x = x.clone().requires_grad_()
    weight = sparse_weights(sparse)["weights.0"]
    weight.collect_dense_gradient = True
    y = sparse(x)
    y.backward(dy)
    assert weight.values.grad is not None and weight.dense_gradient is not None
    entries = weight.layout.entries(weight.active.long())
    values_grad = weight.values.grad
    if weight.storage == "masked":
        values_grad = gather_entries(values_grad, entries)
    grads = {
        name: parameter.grad
        for name, parameter in sparse.named_parameters()
        if not name.endswith("values") and parameter.grad is not None
    }
    assert x.grad is not None
    return {
        "y": y.detach(),
        "x": x.grad,
        "values": values_grad,
        "dense": weight.dense_gradient,
        "dense at entries": gather_entries(weight.dense_gradient, entries),
        **grads,
    }


@pytest.mark.parametrize("life", ["none", "random", "soft", "hardened"])
@pytest.mark.parametrize(("name", "shape"), CASES, ids=CASE_IDS)
def test_packed_equals_masked_and_the_explicit_product(
    name: str, shape: tuple[int, int], life: Life
) -> None:
    packed = layer(name, shape, "packed", life, torch.float32)
    masked = layer(name, shape, "masked", life, torch.float32)
    for tokens in (5, 50):
        x, dy = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[0])
        for sparse in (packed, masked):
            sparse.zero_grad()
            sparse_weights(sparse)["weights.0"].dense_gradient = None
        ours, theirs = run(packed, x, dy), run(masked, x, dy)
        assert ours.keys() == theirs.keys()
        for key in ours:
            # Relative to the size of each quantity, since gradients sum over tokens.
            scale = float(theirs[key].abs().max().clamp(min=1.0))
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5 * scale, rtol=0)
        torch.testing.assert_close(ours["values"], ours["dense at entries"], atol=1e-4, rtol=1e-4)
        dense = sparse_weights(packed)["weights.0"].dense()
        expected = explicit_product(packed, x, dense).detach()
        torch.testing.assert_close(ours["y"], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("life", ["none", "random", "soft", "hardened"])
@pytest.mark.parametrize(("name", "shape"), CASES, ids=CASE_IDS)
def test_fused_projections_equal_masked_ones_before_and_after_a_rewiring(
    name: str, shape: tuple[int, int], life: Life, backend: Backend
) -> None:
    """Q, K and V as one product, in whatever way it is computed."""
    rows, columns = shape
    layers = [
        layer(name, (3 * rows, columns), storage, life, torch.float64, split=3)
        for storage in ("packed", "masked")
    ]
    (product,) = layers[0].parts()
    possible = product.backends(torch.device("cpu"))
    layers[0].use_backends([backend if backend in possible else possible[0]])
    x, dy = torch.randn(5, columns).double(), torch.randn(5, 3 * rows).double()
    for _ in range(2):
        results = []
        for sparse in layers:
            for weight in sparse_weights(sparse).values():
                weight.collect_dense_gradient = True
            inputs = x.clone().requires_grad_()
            y = sparse(inputs)
            y.backward(dy)
            weights = list(sparse_weights(sparse).values())
            gradients = [weight.dense_gradient for weight in weights]
            assert inputs.grad is not None and all(g is not None for g in gradients)
            results.append([y.detach(), inputs.grad, *(g for g in gradients if g is not None)])
            for weight, gradient in zip(weights, gradients, strict=True):
                assert weight.values.grad is not None and gradient is not None
                entries = weight.layout.entries(weight.active.long())
                ours = weight.values.grad
                if weight.storage == "masked":
                    ours = gather_entries(ours, entries)
                torch.testing.assert_close(ours, gather_entries(gradient, entries))
                relayout = weight.rewire(
                    RIGL, step=1, total=10, generator=torch.Generator().manual_seed(1)
                )
                weight.relayout_(relayout)
                weight.dense_gradient = None
            sparse.zero_grad()
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("storage", ["packed", "masked"])
@pytest.mark.parametrize(("name", "shape"), CASES, ids=CASE_IDS)
def test_relayout_moves_values_and_grows_zeros(
    name: str, shape: tuple[int, int], storage: Storage
) -> None:
    sparse = layer(name, shape, storage, "random", torch.float64)
    weight = sparse_weights(sparse)["weights.0"]
    run(sparse, torch.randn(5, shape[1]).double(), torch.randn(5, shape[0]).double())
    before, entries = weight.dense(), weight.layout.num_entries
    moments = torch.rand_like(weight.values)
    if storage == "masked":
        moments = moments * (before != 0)
    relayout = weight.rewire(RIGL, step=1, total=10, generator=torch.Generator())
    moved = weight.move(moments, relayout)
    births = weight.move(torch.zeros_like(moments), relayout, fill=7.0)
    kept, grown = relayout.active[relayout.source >= 0], relayout.active[relayout.source < 0]
    weight.relayout_(relayout)
    after = weight.dense()

    kept_entries = weight.layout.entries(kept)
    grown_entries = weight.layout.entries(grown)
    inside = grown_entries < before.numel()
    torch.testing.assert_close(
        gather_entries(after, kept_entries), gather_entries(before, kept_entries)
    )
    assert not gather_entries(after, grown_entries).any()
    assert int((after != 0).sum()) == int((gather_entries(before, kept_entries) != 0).sum())
    assert weight.layout.num_entries == entries
    if storage == "packed":
        torch.testing.assert_close(
            moved[relayout.source >= 0], moments[relayout.source[relayout.source >= 0]]
        )
        assert not moved[relayout.source < 0].any()
        assert bool((births[relayout.source < 0] == 7).all())
    else:
        torch.testing.assert_close(
            gather_entries(moved, kept_entries), gather_entries(moments, kept_entries)
        )
        assert bool((gather_entries(births, grown_entries)[inside] == 7).all())


def test_the_dense_gradient_sums_over_micro_batches_in_float32_under_bfloat16() -> None:
    sparse = layer("nm-16", (64, 96), "packed", "none", torch.float32)
    weight = sparse_weights(sparse)["weights.0"]
    weight.collect_dense_gradient = True
    x, dy = torch.randn(8, 96), torch.randn(8, 64)
    for part in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = sparse(x[part * 4 : part * 4 + 4])
        assert y.dtype == torch.bfloat16
        y.backward(dy[part * 4 : part * 4 + 4].bfloat16())
    assert weight.dense_gradient is not None and weight.dense_gradient.dtype == torch.float32
    expected = dy.bfloat16().float().T @ x.bfloat16().float()
    torch.testing.assert_close(weight.dense_gradient, expected, atol=1e-4, rtol=1e-4)


def test_no_dense_gradient_unless_asked_for() -> None:
    sparse = layer("block-8", (64, 64), "packed", "none", torch.float32)
    sparse(torch.randn(3, 64)).sum().backward()
    assert sparse_weights(sparse)["weights.0"].dense_gradient is None


def test_state_round_trip_restores_topology_and_hard_permutations() -> None:
    trained = layer("nm-16", (64, 96), "packed", "hardened", torch.float64)
    x = torch.randn(5, 96).double()
    run(trained, x, torch.randn(5, 64).double())
    weight = sparse_weights(trained)["weights.0"]
    weight.relayout_(weight.rewire(RIGL, step=1, total=10, generator=torch.Generator()))
    fresh = layer("nm-16", (64, 96), "packed", "soft", torch.float64)
    fresh.load_state_dict(copy.deepcopy(trained.state_dict()))
    torch.testing.assert_close(fresh(x), trained(x))


def test_a_foreign_topology_is_refused_on_loading() -> None:
    sparse = layer("nm-16", (64, 96), "packed", "none", torch.float32)
    state = sparse.state_dict()
    state["weights.0.active"] = state["weights.0.active"].flip(0)
    with pytest.raises(UserError, match=r"^checkpoint: "):
        sparse.load_state_dict(state)


def test_packed_storage_shrinks_with_density() -> None:
    sparse = layer("nm-16", (64, 96), "packed", "none", torch.float32)
    values = sparse_weights(sparse)["weights.0"].values
    assert values.numel() == 64 * 96 // 4
