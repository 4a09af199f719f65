"""A soft partition moves the mask over a dense weight; then values stand under their units."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dst.small_training import start
from from_yaml import from_yaml
from layers.layer_cases import linear
from padst_exp.errors import UserError
from padst_exp.inference.packing import harden
from padst_exp.layers import Place, SparseLinear
from padst_exp.layers.mask_gate import FLOOR, MaskGate, tied
from padst_exp.permutations import Partition
from padst_exp.sparsify import Rule, sparsify
from structure_cases import STRUCTURES


def layers() -> Iterator[tuple[str, SparseLinear, Partition]]:
    """Layers of every structure with a soft partition on either side."""
    for name, structure in STRUCTURES.items():
        for side in ("in", "out"):
            for storage in ("packed", "masked"):
                torch.manual_seed(0)
                model = nn.Sequential(linear((64, 32)))
                sparsify(
                    model, [Rule("0")], structure=structure, density=0.25,
                    learner=from_yaml("permutation/transport", side=side), storage=storage,  # type: ignore[arg-type]
                )  # fmt: skip
                (partition,) = model[0].permutations().values()
                yield f"{name} {side} {storage}", model[0], partition
    model = nn.Sequential(nn.Conv2d(16, 24, 3))
    learner = from_yaml("permutation/transport", side="in")
    sparsify(
        model, [Rule("0")], structure=STRUCTURES["block-8"], density=0.25, learner=learner
    )  # fmt: skip
    yield "conv", model[0], model[0].input_permutation  # type: ignore[misc]


def gate_of(layer: SparseLinear) -> MaskGate:
    gate = layer.parts()[0].selection
    assert isinstance(gate, MaskGate)
    return gate


def test_every_row_has_the_same_mass_whatever_the_partition() -> None:
    for name, layer, partition in layers():
        gate, (weight,) = gate_of(layer), layer.parts()
        place = gate._place[0]
        # What is learned of: rows of the table, outputs of an input permutation.
        ones = torch.ones(len(gate.kept), weight.geometry.unit_size)
        entries = weight.geometry.entries(gate.kept)
        mask = torch.zeros(weight.shape[0] * weight.shape[1] + 1)
        mask[entries.flatten()] = ones.flatten()
        expected = place.table(mask[:-1].view(weight.shape)).sum(1)
        for sharpness in (0.0, 1.0, 4.0):
            assert partition.logits is not None
            partition.logits.data.copy_(sharpness * torch.randn(partition.logits.shape))
            for _ in range(60):
                partition.project_()
            quotas = partition.shares().detach()
            torch.testing.assert_close(quotas.sum(0), torch.ones(partition.size))
            shares = torch.zeros(mask.shape).index_put(
                (weight.entries().flatten(),), gate.shares().detach().flatten()
            )
            mass = place.table(shares[:-1].view(weight.shape)).sum(1)
            if name.split()[0] != "butterfly":  # part of the weight belongs to no unit there
                torch.testing.assert_close(mass, expected, rtol=0.02, atol=0.02, msg=name)
            assert bool((gate.shares() <= 1 + 1e-5).all())


def test_slots_that_live_and_die_together_are_one_group() -> None:
    for name, size in (
        ("block-8", 8), ("diag-stride", 4), ("nm-16", 1), ("diag", 1), ("unstructured", 1),
    ):  # fmt: skip
        geometry = STRUCTURES[name].geometry(64, 32, 0.25)
        torch.manual_seed(0)
        model = nn.Sequential(linear((64, 32)))
        sparsify(model, [Rule("0")], structure=STRUCTURES[name], density=0.25)
        groups = tied(geometry, Place("0", model[0].parts()[0], "in", 1))
        assert torch.equal(torch.bincount(groups), torch.full((32 // size,), size)), name
        if name == "block-8":
            block = torch.arange(32) // 8
            assert torch.equal(groups[:, None] == groups, block[:, None] == block)


def test_where_all_slots_are_one_group_nothing_is_penalized_and_a_step_can_be_made() -> None:
    model = nn.Sequential(linear((16, 32)))
    learner = from_yaml("permutation/transport", side="out", ramp_start=0.0, ramp_end=0.0)
    sparsify(
        model, [Rule("0")], structure=from_yaml("structure/nm", group=16), density=0.25,
        learner=learner,
    )  # fmt: skip
    (partition,) = model[0].permutations().values()
    assert len(partition.sizes) == 1 and float(partition.penalty()) == 0
    (gradient,) = torch.autograd.grad(partition.penalty(), partition.logits)
    assert not gradient.any()


def test_the_layer_and_the_gradient_of_the_partition_are_those_of_the_formula() -> None:
    for name, layer, partition in layers():
        if not name.startswith(("block-8 ", "diag in", "nm-16 out")):
            continue
        layer.double()
        gate, (weight,) = gate_of(layer), layer.parts()
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
        # W_eff = W sqrt(A Q + floor), entry by entry, from scratch.
        mask = torch.zeros(weight.shape[0] * weight.shape[1] + 1).double()
        mask[weight.geometry.entries(gate.kept).flatten()] = 1
        mask = mask[:-1].view(weight.shape)
        dense = torch.zeros(mask.numel() + 1).double()
        dense[weight.entries().flatten()] = weight.unweighed().flatten()
        dense = dense[:-1].view(weight.shape)
        quotas = partition.shares()
        spread = (quotas / partition.sizes[:, None])[partition.groups]  # [slot, feature]
        moved = mask @ spread if partition.side == "in" else spread.T @ mask
        expected = dense * (moved + FLOOR).sqrt()
        torch.testing.assert_close(weight.matrix(), expected, msg=name)
        dy = torch.randn(weight.shape, dtype=torch.float64)
        assert partition.logits is not None
        ours, theirs = (
            torch.autograd.grad((matrix * dy).sum(), partition.logits)[0]
            for matrix in (weight.matrix(), expected)
        )
        torch.testing.assert_close(ours, theirs, msg=name)


def test_what_lies_under_active_units_stays_and_the_layer_computes_the_same() -> None:
    for name, layer, partition in layers():
        if name.startswith("butterfly"):
            continue  # values without a unit are lost there
        (weight,) = layer.parts()
        permuted = torch.randperm(partition.size)
        holds = permuted if partition.side == "in" else permuted.argsort()
        sharp = torch.full_like(partition.logits, -30.0)  # type: ignore[arg-type]
        sharp[partition.groups, holds] = 0.0
        partition.logits.data.copy_(sharp)  # type: ignore[union-attr]
        before, target = layer.weight.detach().clone(), weight.target.clone()
        assert float(partition.penalty().detach()) < 0.01
        harden(nn.Sequential(layer))
        assert weight.selection is None
        assert torch.equal(weight.topology().counts(), target), name
        now = layer.weight.detach()
        kept = now != 0
        torch.testing.assert_close(now[kept], before[kept], atol=1e-4, rtol=2e-3, msg=name)
        # What left counted the floor only.
        assert float(before[~kept].abs().max()) <= 1.1 * FLOOR**0.5 * 3, name


def test_active_units_are_chosen_by_the_energy_that_lies_under_them() -> None:
    for name, layer, partition in layers():
        if not name.startswith(("block-8 ", "diag in", "nm-16 in")):
            continue
        gate, (weight,) = gate_of(layer), layer.parts()
        sharp = torch.full_like(partition.logits, -30.0)  # type: ignore[arg-type]
        holds = torch.randperm(partition.size)
        sharp[partition.groups, holds] = 0.0
        partition.logits.data.copy_(sharp)  # type: ignore[union-attr]
        gate.choose()
        mean = partition.groups  # energies inside a group are spread evenly over its slots
        raw = torch.zeros(weight.shape[0] * weight.shape[1] + 1)
        raw[weight.entries().flatten()] = weight.unweighed().square().flatten()
        square = gate._place[0].table(raw[:-1].view(weight.shape))[:, holds]
        for group in mean.unique():
            inside = mean == group
            square[:, inside] = square[:, inside].mean(1, keepdim=True)
        scores = weight.geometry.unit_rms(gate._place[0].matrix(square).sqrt()).flatten()
        threshold = scores[gate.kept].min()
        others = torch.ones(len(scores), dtype=torch.bool)
        others[gate.kept] = False
        if weight.geometry.num_pools == 1:
            assert float(scores[others].max()) <= float(threshold) * (1 + 1e-4), name


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"^permutation\.side: expected in, out or auto: .* both$"):
        from_yaml("permutation/transport", side="both")
    for dst in ("dynadiag", "gmp", "granet"):
        with pytest.raises(UserError, match=r"^dst: expected one that starts at the density "):
            start(
                from_yaml(f"dst/{dst}"), STRUCTURES["block-4"], steps=4,
                learner=from_yaml("permutation/transport"),
            )  # fmt: skip
