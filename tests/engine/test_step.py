from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_cases import rigl
from engine.toy import (
    Samples,
    ToyTask,
    toy_experiment,
    toy_layers,
    toy_learner,
    toy_run,
    toy_state,
    toy_trainer,
)
from from_yaml import from_yaml
from padst_exp.dst import Algorithm, Change, Signals, Topology
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.records import read_metrics
from padst_exp.engine.step import Stepper, compile_blocks
from padst_exp.layers import SparseLinear, SparseWeight, sparse_layers, sparse_weights
from padst_exp.permutations import DoublyStochastic, Permutation


def stepper(experiment: Experiment) -> tuple[Stepper, list[tuple[str, Mapping[str, Any]]]]:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    state = toy_state(experiment)
    record = lambda kind, values: rows.append((kind, values))  # noqa: E731
    return Stepper(experiment, state, record=record, say=lambda line: None), rows


class Spy(Algorithm):
    """Changes nothing, and keeps what it was shown of the weights it may change."""

    needs = frozenset({"dense_gradient", "weight_gradient", "coordinates", "age"})

    def __init__(self, *may_change: int) -> None:
        self.may_change = may_change
        self.asked = 0
        self.signals: list[Signals] = []

    def is_due(self, step: int, total: int) -> bool:
        return step == 1

    def can_change(self, topology: Topology) -> bool:
        self.asked += 1
        return self.asked - 1 in self.may_change

    def decide(
        self, topology: Topology, signals: Signals, *, step: int, total: int, carry: float
    ) -> tuple[Change, float]:
        self.signals.append(signals)
        return Change(topology.active), carry


def fused(spy: Spy) -> tuple[Experiment, SparseLinear]:
    """One sparse layer of two weights in float64, with a clip that leaves nothing of a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 4))
    experiment = toy_experiment(
        model=model,
        algorithm=spy,
        learner=from_yaml("permutation/random", side="out"),
        trainer=toy_trainer(precision="float64", micro_batches=4, clip_norm=1e-9),
        split=2,
    )
    layer = experiment.model.double()[0]  # type: ignore[index]
    assert isinstance(layer, SparseLinear) and len(layer.parts()) == 2
    return experiment, layer


@pytest.mark.parametrize("asked", [(0, 1), (1,)])
def test_signals_are_the_gradient_of_the_whole_batch_before_clipping(asked: tuple[int]) -> None:
    spy = Spy(*asked)
    experiment, layer = fused(spy)
    batch = Samples(16, 3)
    inputs = batch.inputs.double()
    # As a dense layer sees it: rows of S stand where the output permutation takes them from.
    reference = layer.weight.detach().clone().requires_grad_()
    hidden = nn.functional.linear(inputs, reference, layer.bias)
    last = experiment.model[2]  # type: ignore[index]
    loss = ToyTask().loss(last(nn.functional.gelu(hidden)), batch.targets)
    (gradient,) = torch.autograd.grad(loss, reference)

    parts = iter(list(zip(batch.inputs.split(4), batch.targets.split(4), strict=True)))
    mover, rows = stepper(experiment)
    mover.step(parts)
    assert len(spy.signals) == len(asked) and rows[0][0] == "rewire"
    for number, signals in zip(asked, spy.signals, strict=True):
        weight = layer.parts()[number]
        permutation = layer.permutations()["out", number]
        rows_of = gradient.split(32 // 2)[number][permutation.index.argsort()]
        expected = weight.geometry.unit_rms(rows_of)
        assert signals.dense_gradient is not None and signals.weight_gradient is not None
        torch.testing.assert_close(signals.dense_gradient, expected, rtol=1e-5, atol=1e-9)
        active = expected.flatten()[weight.active.long()]
        torch.testing.assert_close(signals.weight_gradient, active, rtol=1e-5, atol=1e-9)
        assert signals.age is not None and (signals.age == 1).all()
        assert signals.coordinates is not None
        assert weight.dense_gradient is None and weight.weight_gradient is None


def test_what_no_score_asks_for_is_not_computed() -> None:
    experiment = toy_experiment(algorithm=rigl(interval=2))
    mover, _ = stepper(experiment)
    seen: list[Tensor | None] = []
    original = SparseWeight.decide

    def decide(self: SparseWeight, *arguments: Any, **named: Any) -> Change:
        seen.append(self.weight_gradient)
        assert self.dense_gradient is not None and named["birth"] is None
        return original(self, *arguments, **named)

    batches = iter([(s.inputs, s.targets) for s in (Samples(8, seed) for seed in range(8))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseWeight, "decide", decide)
        for _ in range(3):
            mover.step(batches)
            gradients = [w.dense_gradient for w in sparse_weights(mover.model).values()]
            assert gradients == [None, None]
    assert seen == [None, None] and mover.state.births is None


def test_a_learner_looks_at_its_own_interval(tmp_path: Any) -> None:
    for dst in (rigl(fraction=0.3, interval=4, stop=0.75), from_yaml("dst/static")):
        name = type(dst).__name__
        learner = toy_learner(interval=7, delta=1e-6)
        _, directory, _ = toy_run(tmp_path, name=name, algorithm=dst, learner=learner)
        rows = read_metrics(directory.path / "metrics.jsonl")
        # Past the deadline at half of 30 steps, at the third look.
        assert {row["step"] for row in rows if row["kind"] == "harden"} == {21}
        updates = [row["step"] for row in rows if row["kind"] == "rewire"]
        assert updates == ([4, 8, 12, 16, 20] if name == "DropGrow" else [])


class Offset(Permutation):
    """Has a penalty of its own."""

    def penalty(self) -> Tensor:
        return super().penalty() * 0.25 + (0.5 if self.soft else 0.0)


class Offsetting(DoublyStochastic):
    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        drawn = super().create(size, generator)
        assert drawn is not None and drawn.logits is not None
        return Offset(drawn.logits.detach())


def test_the_logged_penalty_is_the_one_that_is_learned(tmp_path: Any) -> None:
    learner = toy_learner(Offsetting, delta=0.55)
    experiment = toy_experiment(learner=learner)
    mover, rows = stepper(experiment)
    while any(learner.choices for learner in mover.state.learners):
        expected = {name: float(c.penalty().detach()) for name, c in learner.choices.items()}
        assert mover.soft_metrics()["penalty"] == pytest.approx(expected, rel=1e-6)
        assert all(penalty > 0.5 for penalty in expected.values())
        mover.step(iter([(s.inputs, s.targets) for s in (Samples(8, 1), Samples(8, 2))]))
    hardened = [values for kind, values in rows if kind == "harden"]
    assert len(hardened) == 2 and {values["of"] for values in hardened} == {"permutation"}
    for values in hardened:
        assert values["penalty"] > 0.5
        assert (values["reason"] == "delta") == (values["penalty"] < 0.55)


def test_blocks_are_found_for_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Sequential):
        pass

    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    blocks = [Block(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) for _ in range(3)]
    compile_blocks(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"h": nn.ModuleList(blocks)})))
    assert compiled == blocks


def test_frozen_layers_stay_as_they_are_through_updates_and_hardenings(tmp_path: Any) -> None:
    model = toy_layers()
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    experiment = toy_experiment(model=model)
    frozen, other = sparse_layers(experiment.model).values()
    kept = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    bias, active = model[4].bias.clone(), other.parts()[0].active.clone()
    mover, rows = stepper(experiment)
    for _ in range(20):
        mover.step(iter([(s.inputs, s.targets) for s in (Samples(8, 1), Samples(8, 2))]))
    assert sum(kind == "rewire" for kind, _ in rows) == 4
    hardened = [values["choice"] for kind, values in rows if kind == "harden"]
    assert hardened and all(name.startswith("4.") for name in hardened)
    assert not torch.equal(other.parts()[0].active, active)
    for name, tensor in frozen.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    assert not any(p.requires_grad for p in frozen.parameters())
    assert torch.equal(model[4].bias, bias) and not model[4].bias.requires_grad
    assert other.parts()[0].values.requires_grad
