"""Methods that weigh all units first and choose among them later."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dst.small_training import Training, start
from from_yaml import from_yaml
from padst_exp.dst import Algorithm, DynaDiag, MagnitudeGate, Selection
from padst_exp.engine import changes
from padst_exp.layers import SparseWeight, sparse_weights
from padst_exp.structures import (
    NM,
    Block,
    Diagonal,
    FanIn,
    Structure,
    Unstructured,
    gather_entries,
)

DIAG = Diagonal(bundle=1, stride=16, width=16)
STRUCTURES: list[Structure] = [
    DIAG,
    Diagonal(bundle="band", stride=16, width=5),
    Diagonal(bundle="stride", stride=16, width=16),
    Block(size=8, balanced=True),
    NM(n=2, m=None, group=16),
    NM(n=2, m=4, group=1),
    FanIn(group=8),
    Unstructured(),
]


def dynadiag(**changes: Any) -> DynaDiag:
    return from_yaml("dst/dynadiag", **{"interval": 1, "freeze": 0.5, "lr": 0.03, **changes})


def softly(training: Training) -> dict[str, tuple[SparseWeight, Selection]]:
    """The weights whose selection is soft."""
    weights = sparse_weights(training.model).items()
    return {name: (w, w.selection) for name, w in weights if w.selection is not None}  # type: ignore[misc]


def test_the_budget_is_kept_at_every_step_over_any_structure() -> None:
    for structure in STRUCTURES:
        density = 0.5 if getattr(structure, "m", None) else 0.3
        training = start(dynadiag(), structure, steps=8, density=density)
        for weight, _ in softly(training).values():
            assert len(weight.active) == int(weight.geometry.candidates.sum())
        sums = 0

        def check(now: Training) -> None:
            nonlocal sums
            for weight, selection in softly(now).values():
                per_pool = torch.zeros(weight.geometry.num_pools)
                per_pool.index_add_(0, selection.pools, selection.coefficients().detach())
                torch.testing.assert_close(per_pool, weight.target.float(), atol=1e-3, rtol=1e-4)
                sums += 1

        training.run(8, check)
        assert sums == 2 * 3 and not softly(training)
        for weight in sparse_weights(training.model).values():
            assert torch.equal(weight.topology().counts(), weight.target)
            assert weight.values.shape == (int(weight.target.sum()), weight.geometry.unit_size)
        assert [row["reason"] for row in training.rows if row["kind"] == "harden"] == [
            "deadline"
        ] * 2


def test_the_published_clamp_loses_what_ours_keeps() -> None:
    # min(k softmax(a / T), 1) of 768 importances, 77 of them wanted (DynaDiag, equation 5).
    training = start(dynadiag(), DIAG, steps=1)
    _, selection = next(iter(softly(training).values()))
    generator = torch.Generator().manual_seed(0)
    importances = torch.randn(len(selection.units), generator=generator) * 0.02
    assert selection.logits is not None
    selection.logits.data.copy_(importances)
    selection.temperature.fill_(0.01)
    budget = int(selection.target.sum())
    published = (budget * (importances / 0.01).softmax(0)).clamp(max=1)
    assert float(published.sum()) < 0.9 * budget
    assert float(selection.coefficients().detach().sum()) == pytest.approx(budget, rel=1e-4)


def test_the_freeze_is_continuous_and_everything_follows() -> None:
    for structure in (DIAG, Block(size=8, balanced=False)):
        training = start(dynadiag(freeze=0.9), structure, steps=60, ema_decay=0.9).run(53)
        optimizer, average = training.state.optimizer, training.state.average
        steps = {
            name: optimizer.state[weight.values]["step"].clone()
            for name, (weight, _) in softly(training).items()
        }
        # The step that ends in the freeze: the loss of its batch just before and just after.
        training.run(1)
        assert [row["kind"] for row in training.rows] == ["harden", "harden"]
        for row in training.rows:
            assert row["loss_after"] == pytest.approx(row["loss_before"], rel=0.02)
            assert row["penalty"] < 0.05
        for name, weight in sparse_weights(training.model).items():
            assert weight.selection is None and average is not None
            now = optimizer.state[weight.values]
            assert now["exp_avg"].shape == weight.values.shape
            assert now["step"] == steps[name] + 1
            owners = [p for group in optimizer.param_groups for p in group["params"]]
            assert sum(p is weight.values for p in owners) == 1
            averaged = sparse_weights(average.model)[name]
            assert torch.equal(averaged.active, weight.active) and averaged.selection is None
        training.run(6)


def test_the_freeze_moves_values_and_moments_of_what_stays() -> None:
    training = start(dynadiag(freeze=1.0), DIAG, steps=40).run(30)
    stepper, state = training.stepper, training.state
    weight, selection = softly(training)["0.weights.0"]
    values, coefficients = weight.values.detach().clone(), selection.coefficients().detach()
    moments = state.optimizer.state[weight.values]["exp_avg"].clone()
    chosen = torch.searchsorted(selection.units, selection.nearest())
    learner = state.learners[1]
    learner.algorithm.freeze = 0.5  # type: ignore[attr-defined]
    changes.harden(stepper.experiment, state, [learner], lambda: 0.0)
    assert torch.equal(weight.values.detach(), (values * coefficients[:, None])[chosen])
    assert torch.equal(state.optimizer.state[weight.values]["exp_avg"], moments[chosen])
    assert torch.equal(weight.active.long(), selection.units[chosen])


def test_storage_makes_no_difference() -> None:
    losses = []
    for storage in ("packed", "masked"):
        training = start(dynadiag(), DIAG, steps=20, storage=storage)  # type: ignore[arg-type]
        losses.append(torch.tensor(training.run(20).state.losses))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)


def test_temperatures_follow_their_schedule() -> None:
    changes = {"temperature": 2.0, "final_temperature": 0.1, "freeze": 0.4}
    halfway = {"cosine": 0.1 + 1.9 * 0.5, "linear": 0.1 + 1.9 * 0.5, "constant": 0.1}
    quarter = {"cosine": 0.1 + 1.9 * (1 + math.cos(math.pi / 4)) / 2, "linear": 0.1 + 1.9 * 0.75}
    for schedule in ("cosine", "linear", "constant"):
        algorithm = dynadiag(schedule=schedule, **changes)
        assert algorithm.temperature_at(0.2) == pytest.approx(halfway[schedule])
        assert algorithm.temperature_at(0.1) == pytest.approx(quarter.get(schedule, 0.1))
        assert algorithm.temperature_at(0.4) == algorithm.temperature_at(1.0) == pytest.approx(0.1)
        training = start(algorithm, DIAG, steps=10)
        for step in (1, 2, 3):
            training.run(1)
            for _, selection in softly(training).values():
                expected = algorithm.temperature_at(step / 10)
                assert float(selection.temperature) == pytest.approx(expected)


def test_l1_holds_importances_back() -> None:
    def size(l1: float) -> float:
        training = start(dynadiag(l1=l1, freeze=1.0), DIAG, steps=40).run(20)
        return sum(float(s.logits.abs().sum()) for _, s in softly(training).values())  # type: ignore[union-attr]

    assert size(10.0) < 0.5 * size(0.0)


def test_a_density_of_one_leaves_nothing_to_select() -> None:
    training = start(dynadiag(), DIAG, steps=2, density=1.0)
    assert not softly(training) and all(layer.static for layer in training.report.layers)
    training.run(2)


GATED: list[tuple[str, Structure, float]] = [
    ("sr_ste", NM(n=2, m=4, group=1), 0.5),
    ("sr_ste", NM(n=2, m=None, group=16), 0.3),
    ("top_kast", Unstructured(), 0.3),
    ("top_kast", Block(size=8, balanced=False), 0.3),
]


def gated(name: str, **changes: Any) -> Algorithm:
    return from_yaml(f"dst/{name}", **{"interval": 1, "freeze": 0.5, **changes})


def largest(magnitudes: Tensor, gate: MagnitudeGate, counts: Tensor) -> list[int]:
    """Units of the largest magnitudes of each pool, by sorting in Python."""
    chosen = []
    for pool, count in enumerate(counts.tolist()):
        own = [int(i) for i in (gate.pools == pool).nonzero()]
        own.sort(key=lambda i: (-float(magnitudes[i]), i))
        chosen += own[:count]
    return sorted(chosen)


def test_gates_compute_with_the_largest_and_pass_gradients_to_more() -> None:
    for name, structure, density in GATED:
        for storage in ("packed", "masked"):
            training = start(gated(name), structure, steps=20, density=density, storage=storage)  # type: ignore[arg-type]
            training.run(3)
            weight = sparse_weights(training.model)["0.weights.0"]
            gate = weight.selection
            assert isinstance(gate, MagnitudeGate) and gate.soft
            magnitudes = weight.magnitudes()
            kept = largest(magnitudes, gate, weight.target)
            share = 1.0 if name == "sr_ste" else 0.5
            numbers = (weight.geometry.candidates * share).round().long().maximum(weight.target)
            learning = largest(magnitudes, gate, numbers)
            forward, backward = torch.zeros(len(magnitudes)), torch.zeros(len(magnitudes))
            forward[kept], backward[learning] = 1, 1
            assert torch.equal(weight.packed(), weight.unweighed() * forward[:, None])
            weight.values.grad = None
            upstream = torch.randn(weight.shape)
            (weight.matrix() * upstream).sum().backward()
            found = weight.values.grad
            assert found is not None
            entries = weight.entries()
            if storage == "masked":
                found = gather_entries(found, entries)
            wanted = gather_entries(upstream, entries) * backward[:, None]
            torch.testing.assert_close(found, wanted)

            weight.values.grad = torch.zeros_like(weight.values)
            training.state.learners[1].regularize_weights()
            added = weight.values.grad
            added = gather_entries(added, entries) if storage == "masked" else added
            if name == "sr_ste":
                rate = 0.0002 * (1 - forward)
            else:
                density_kept = len(kept) / len(forward)
                rate = 0.0001 * (forward + (backward - forward) / density_kept)
            torch.testing.assert_close(added, rate[:, None] * weight.unweighed())


def test_gates_freeze_to_what_computes_then() -> None:
    for name, structure, density in GATED:
        for freeze in (0.5, 1.0):
            training = start(
                gated(name, freeze=freeze), structure, steps=12, density=density, ema_decay=0.9
            )
            training.run(12)
            kinds = [row for row in training.rows if row["kind"] == "harden"]
            assert [row["step"] for row in kinds] == [int(12 * freeze)] * 2
            for row in kinds:
                # What went had not computed, so that nothing changes at all.
                assert row["loss_after"] == pytest.approx(row["loss_before"], rel=1e-5)
            for weight in sparse_weights(training.model).values():
                assert torch.equal(weight.topology().counts(), weight.target)
                assert weight.values.shape[0] == int(weight.target.sum())
            average = training.state.average
            assert average is not None
            for name_, weight in sparse_weights(average.model).items():
                assert torch.equal(weight.active, sparse_weights(training.model)[name_].active)


def test_a_copy_of_a_gate_looks_at_the_copy_of_its_weight() -> None:
    training = start(gated("sr_ste"), NM(n=2, m=4, group=1), steps=4, density=0.5)
    weight = sparse_weights(training.model)["0.weights.0"]
    other = copy.deepcopy(weight)
    with torch.no_grad():
        other.values.copy_(other.values.flip(0))
    assert torch.equal(other.packed() != 0, (weight.packed() != 0).flip(0))
