"""Hard permutations that change in training: values, moments and averages go along."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from from_yaml import from_yaml
from layers.layer_cases import linear, sparse_layer
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear, SparseWeight, evidence, places
from padst_exp.permutations import Exchange, HeldPermutation, Permutation, TurningPermutation
from padst_exp.soft import soft_choices
from padst_exp.sparsify import Rule, sparsify
from structure_cases import STRUCTURES


def layers() -> Iterator[tuple[str, SparseLinear]]:
    """Layers of every structure, with a hard permutation on both sides of several weights."""
    for name, structure in STRUCTURES.items():
        for storage in ("packed", "masked"):
            layer = sparse_layer(
                linear((64, 32), 2), structure, life="random", storage=storage, split=2
            )
            yield f"{name} {storage}", layer
    conv = nn.Conv2d(16, 24, 3)
    yield "conv", sparse_layer(conv, STRUCTURES["block-8"], life="random")


def support(layer: SparseLinear) -> Tensor:
    """Bool, where the layer as a whole may have entries."""
    twin = [weight.values.detach().clone() for weight in layer.parts()]
    with torch.no_grad():
        for weight in layer.parts():
            entries = weight.entries()
            ones = torch.ones(entries.shape)
            filled = ones if weight.storage == "packed" else torch.ones(weight.shape)
            weight.values.copy_(filled)
        mask = layer.weight.detach() != 0
        for weight, values in zip(layer.parts(), twin, strict=True):
            weight.values.copy_(values)
    return mask


def exchange(layer: SparseLinear, permutation: Permutation, proposal: Exchange) -> int:
    before, lost = permutation.held().clone(), 0
    for place in places(nn.Sequential(layer), permutation):
        lost += place.weight.adopt(place.change(before, proposal)).num_new
    permutation.exchange(proposal)
    return lost


def test_what_still_has_a_place_keeps_its_value_and_its_feature() -> None:
    for name, layer in layers():
        for key, permutation in layer.permutations().items():
            for weight in layer.parts():  # what lost its value before has one again
                twin = SparseWeight(
                    weight.geometry, weight.active.long(), torch.randn(weight.shape), weight.storage
                )
                weight.values.data.copy_(twin.values.detach())
            before = layer.weight.detach().clone()
            index = torch.randperm(permutation.size)
            lost = exchange(layer, permutation, Exchange(index=index, carry=True))
            now, mask = layer.weight.detach(), support(layer)
            assert torch.equal(now, before * mask), (name, key)
            assert lost == int((mask & (before == 0)).sum()), (name, key)
            if before.dim() == 2:  # folded into the product, it is the same
                x = torch.randn(3, before.shape[1])
                bias = 0 if layer.bias is None else layer.bias
                torch.testing.assert_close(layer(x), x @ now.T + bias, atol=1e-5, rtol=1e-5)


def test_values_that_stay_in_their_slots_may_change_their_signs() -> None:
    for name, layer in layers():
        for (side, part), permutation in layer.permutations().items():
            found = list(places(nn.Sequential(layer), permutation))
            before = [place.table(place.weight.matrix().detach()).clone() for place in found]
            signs = torch.randint(0, 2, (permutation.size,)) * 2.0 - 1
            index = permutation.index.roll(1)
            lost = exchange(layer, permutation, Exchange(index=index, carry=False, signs=signs))
            assert lost == 0
            for place, old in zip(found, before, strict=True):
                now = place.table(place.weight.matrix().detach())
                assert torch.equal(now, old * signs), (name, side, part)


def test_evidence_has_slots_as_columns_and_gradients_of_disjoint_samples() -> None:
    for name, layer in layers():
        if not isinstance(layer, SparseLinear) or layer.taps > 1:
            continue
        x, dy = torch.randn(6, layer.in_features), torch.randn(6, layer.out_features)
        for weight in layer.parts():
            weight.collect_dense_gradient, weight.gradient_parts = True, 3
        layer(x).backward(dy)
        for (side, _), permutation in layer.permutations().items():
            found = list(places(nn.Sequential(layer), permutation))
            known = evidence(found, 7)
            assert known.budget == 7 and known.side == side
            assert bool((known.values[~known.active] == 0).all())
            first = found[0].weight
            assert first.part_gradients is not None and first.dense_gradient is not None
            torch.testing.assert_close(first.part_gradients.sum(0), first.dense_gradient)
            if side == "in":
                for part, samples in enumerate(torch.arange(6).split(2)):
                    # As the parts of all weights, before their output permutations.
                    rows = []
                    for i, place in enumerate(found):
                        out = dy[samples].split(place.weight.shape[0], 1)[i]
                        index = layer.permutations()["out", i].index
                        rows.append(torch.zeros_like(out).index_copy_(1, index, out))
                    wanted = torch.cat(rows, 1).T @ x[samples][:, permutation.index]
                    torch.testing.assert_close(known.gradients[part], 3 * wanted, msg=name)
        for weight in layer.parts():
            weight.part_gradients = weight.dense_gradient = None


def test_a_held_permutation_is_exact_and_its_scores_get_the_gradient_of_its_matrix() -> None:
    for size in (2, 13):
        permutation = HeldPermutation(torch.randperm(size)).double()
        x = torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True)
        assert torch.equal(permutation(x), x[..., permutation.current])
        assert permutation.logits is not None
        dy = torch.randn(2, 3, size, dtype=torch.float64)
        ours = torch.autograd.grad((permutation(x) * dy).sum(), (x, permutation.logits))
        whole = (x @ permutation.matrix().T * dy).sum()
        theirs = torch.autograd.grad(whole, (x, permutation.logits))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
        assert float(permutation.penalty()) == 0
        index = permutation.nearest()
        permutation.harden()
        assert torch.equal(permutation.index, index)
        with pytest.raises(AssertionError):
            permutation.exchange(Exchange(index=torch.zeros(size, dtype=torch.int64), carry=True))


def test_turning_loses_no_norm_and_is_exact_in_every_gradient() -> None:
    for size in (2, 13):
        permutation = TurningPermutation(torch.randperm(size)).double()
        assert permutation.logits is not None
        pairs = torch.randperm(size)[: size // 2 * 2].view(-1, 2)
        permutation.partner[pairs] = pairs.flip(1)
        permutation.logits.data.copy_(torch.randn(size))
        x = torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True)
        matrix = permutation.matrix()
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double())
        torch.testing.assert_close(permutation(x), x @ matrix.T)
        dy = torch.randn(2, 3, size, dtype=torch.float64)
        ours = torch.autograd.grad((permutation(x) * dy).sum(), (x, permutation.logits))
        whole = (x @ permutation.matrix().T * dy).sum()
        theirs = torch.autograd.grad(whole, (x, permutation.logits))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
        permutation.logits.data.fill_(0.5 * torch.pi)
        moved = permutation.partner != torch.arange(size)
        assert bool((permutation.quarters()[moved] % 2 == 1).all())
        swapped = permutation.current[permutation.partner]
        assert torch.equal(permutation.nearest()[moved], swapped[moved])
        assert float(permutation.penalty().detach()) == pytest.approx(0, abs=1e-6)


def test_whole_quarters_are_folded_into_index_and_values() -> None:
    """What a layer computes does not change when a round ends, and halves choose what comes."""
    for split in (1, 2):
        for structure in ("block-8", "diag", "nm-16"):
            torch.manual_seed(0)
            learner = from_yaml("permutation/givens", side="both", start=0.0, interval=1)
            model = nn.Sequential(linear((32, 32), split))
            sparsify(
                model, [Rule("0", split)], structure=STRUCTURES[structure], density=0.3,
                learner=learner,
            )  # fmt: skip
            layer, found = model[0].double(), soft_choices(model)
            learner.start(found)
            assert learner.exchanges(1, 10, rewiring=False) == found and len(found) == 1 + split
            for permutation in found.values():
                x = torch.randn(64, 32, dtype=torch.float64)
                for weight in layer.parts():
                    weight.collect_dense_gradient, weight.gradient_parts = True, 2
                    weight.part_gradients = None
                permutation.partner.copy_(torch.arange(32).view(-1, 2).flip(1).flatten())
                permutation.logits.data.copy_(torch.randint(-2, 3, (32,)) * torch.pi / 2)
                y = layer(x)
                y.backward(y - torch.randn_like(y))
                before, whole = layer.weight.detach().clone(), list(places(model, permutation))
                proposal = learner.exchange(permutation, evidence(whole, 0.0))
                held = permutation.held().clone()
                for place in whole:
                    place.weight.adopt(place.change(held, proposal))
                permutation.exchange(proposal)
                torch.testing.assert_close(layer.weight.detach(), before)
                partner = permutation.partner
                assert torch.equal(partner[partner], torch.arange(32))
                # A small turn of the pairs chosen lowers the loss by what their slopes say.
                (slope,) = torch.autograd.grad(
                    (layer(x) * (y - torch.randn_like(y)).detach()).sum(), permutation.logits
                )
                chosen = partner > torch.arange(32)
                assert chosen.any() and bool((slope[chosen] != 0).all())


def test_straight_through_exchanges_for_the_best_assignment_of_what_it_gathered() -> None:
    learner = from_yaml("permutation/straight_through", memory=0.5, start=0.2, interval=5)
    permutation = learner.create(7, torch.Generator().manual_seed(0))
    learner.start({"p": permutation})
    assert learner.exchanges(5, 100, rewiring=False) == {}  # too early
    assert learner.exchanges(26, 100, rewiring=False) == {}  # between two assignments
    assert learner.exchanges(25, 100, rewiring=False) == {"p": permutation}
    assert learner.exchanges(30, 100, rewiring=False) == {}  # past the deadline
    wanted = permutation.current.roll(1)
    for _ in range(3):
        permutation.logits.grad = -torch.eye(7)[wanted]
        learner.step(0.2)
    torch.testing.assert_close(permutation.logits.detach(), 0.875 * torch.eye(7)[wanted])
    proposal = learner.exchange(permutation, None)
    assert torch.equal(proposal.index, wanted) and proposal.carry
    permutation.exchange(proposal)
    assert learner.exchange(permutation, None) is None
    assert learner.ready(permutation, 0.29) is None
    assert learner.ready(permutation, 0.3) == "deadline"
    for key, value in {"memory": 1.0, "start": 1.0, "deadline": 0.0, "interval": 0}.items():
        with pytest.raises(UserError, match=rf"^permutation\.{key}: expected .*, got {value}$"):
            from_yaml("permutation/straight_through", **{key: value})
