from typing import Any, get_args

import pytest
import torch
from torch import nn

from dst_cases import set_algorithm
from engine.moving import Moving, Young
from engine.toy import toy_experiment, toy_learner, toy_state
from from_yaml import from_yaml
from padst_exp.dst import Change, Cubic
from padst_exp.engine import changes
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.state import TrainingState
from padst_exp.errors import UserError
from padst_exp.layers import SparseWeight, permutations, sparse_weights
from padst_exp.permutations import DoublyStochastic
from padst_exp.soft import Readiness, Soft
from padst_exp.structures import Storage, scatter_entries


def trained(experiment: Experiment, steps: int = 3) -> TrainingState:
    """The state after some plain steps."""
    state = toy_state(experiment)
    for _ in range(steps):
        state.optimizer.zero_grad()
        state.model(torch.randn(8, 24)).square().sum().backward()
        state.optimizer.step()
        state.step += 1
        if state.average is not None:
            state.average.update(state.step)
    return state


def update(experiment: Experiment, state: TrainingState) -> list[Any]:
    return changes.update_topologies(experiment, state, sparse_weights(state.model).values())


def dense(weight: SparseWeight, tensor: torch.Tensor) -> torch.Tensor:
    """What is shaped like the values of a weight, or has one number a unit, as `[O, I]`."""
    if weight.storage == "masked":
        return tensor.detach().clone()
    entries = weight.entries()
    return scatter_entries(tensor.detach().expand(entries.shape), entries, weight.shape)


def active_entries(weight: SparseWeight) -> torch.Tensor:
    entries = weight.entries()
    return scatter_entries(torch.ones(entries.shape), entries, weight.shape) != 0


def states(state: TrainingState, name: str) -> dict[str, torch.Tensor]:
    """All that follows one weight, in the places of a dense weight."""
    assert state.average is not None
    weight, averaged = (sparse_weights(m)[name] for m in (state.model, state.average.model))
    moments = state.optimizer.state[weight.values]
    kept = {key: value for key, value in moments.items() if value.ndim and key != "births"}
    everything = {"values": weight.values, "average": averaged.values, **kept}
    assert torch.equal(averaged.active, weight.active)
    return {key: dense(weight, tensor) for key, tensor in everything.items()}


@pytest.mark.parametrize("optimizer", ["adamw-age", "adamw-zero", "sgd", "muon-age"])
def test_everything_follows_the_units(optimizer: str) -> None:
    for storage in get_args(Storage):
        for shrinking in (False, True):
            check_that_everything_follows(optimizer, storage, shrinking)


def check_that_everything_follows(optimizer: str, storage: Storage, shrinking: bool) -> None:
    name, _, moments = optimizer.partition("-")
    counts = {"counts": Cubic(start=0.8, begin=0.0, end=0.2)} if shrinking else {}
    experiment = toy_experiment(
        algorithm=set_algorithm(moments=moments or "age", **counts),
        optimizer=from_yaml(f"optimizer/{name}", lr=0.01),
        storage=storage,
    )
    state = trained(experiment)
    weights = sparse_weights(state.model)
    before = {name: states(state, name) for name in weights}
    was_active = {name: active_entries(weight) for name, weight in weights.items()}
    parameters = {name: weight.values for name, weight in weights.items()}
    moves = update(experiment, state)

    assert state.tracker.updates == 1 and sum(move.num_grown for move in moves) > 0
    for name, weight in weights.items():
        # Whoever trains them knows of other Parameters, and of no others.
        replaced = shrinking and storage == "packed"
        assert (weight.values is not parameters[name]) == replaced
        trained_now = {p for group in state.optimizer.param_groups for p in group["params"]}
        assert weight.values in trained_now and state.optimizer.state.keys() <= trained_now
        assert (parameters[name] in trained_now) != replaced

        active = active_entries(weight)
        kept = active & was_active[name]
        grown = active & ~was_active[name]
        assert kept.any() and grown.any() and (was_active[name] & ~active).any()
        now = states(state, name)
        assert {"values", "average"} < now.keys()
        birth = now.pop("birth", None)
        assert (birth is not None) == (moments == "age")
        if birth is not None:
            assert (birth[kept] == 0).all() and (birth[grown] == 1).all()
            assert state.optimizer.state[weight.values]["births"].tolist() == [0, 3]
        for key, tensor in now.items():
            assert torch.equal(tensor[kept], before[name][key][kept]), key
            assert (tensor[kept] != 0).any() and (tensor[~kept] == 0).all(), key
        assert weight.dense_gradient is None
    state.model(torch.randn(8, 24)).sum().backward()
    state.optimizer.step()
    assert state.average is not None
    state.average.update(4)


def test_nothing_is_born_where_nothing_grows() -> None:
    class Prune(Moving):
        def decide(self, topology: Any, *_: Any, **__: Any) -> tuple[Change, float]:
            return Change(topology.active[1::2]), 0.0

    experiment = toy_experiment(algorithm=Prune())
    state = trained(experiment)
    wide = sparse_weights(state.model)["4.weights.0"]
    wide.dense_gradient = torch.zeros(wide.shape)
    wide.weight_gradient = torch.zeros_like(wide.values)
    changes.update_topologies(experiment, state, [wide])
    assert "birth" not in state.optimizer.state[wide.values]


def test_an_update_depends_on_seed_and_step_only() -> None:
    def updated(seed: int, step: int) -> str:
        experiment = toy_experiment(algorithm=set_algorithm())
        object.__setattr__(experiment, "seed", seed)
        state = toy_state(experiment)
        torch.rand(seed + step)  # whatever else was drawn before
        state.step = step
        update(experiment, state)
        return changes.topology_digest(state.model)

    assert updated(0, 1) == updated(0, 1)
    assert len({updated(0, 1), updated(0, 2), updated(1, 1)}) == 3


def test_ages_count_from_the_step_at_which_a_unit_came() -> None:
    experiment = toy_experiment(algorithm=set_algorithm(drop=Young()))
    state = toy_state(experiment)
    weight = sparse_weights(state.model)["4.weights.0"]
    assert state.births is not None
    born = {int(unit): 0 for unit in weight.active}
    for step in (3, 7, 12):
        state.step = step
        weight.weight_gradient = torch.randn_like(weight.values)
        changes.update_topologies(experiment, state, [weight])
        born = {int(unit): born.get(int(unit), step) for unit in weight.active}
        assert state.births.steps["4.weights.0"].tolist() == list(born.values())
    assert len(set(born.values())) == 4


def test_hardening_one_of_two_keeps_the_state_of_the_other() -> None:
    first: Soft | None = None

    class FirstOnly(DoublyStochastic):
        def ready(self, choice: Soft, progress: float) -> Readiness:
            return "deadline" if choice is first else None

    learner = toy_learner(FirstOnly, side="in")
    experiment = toy_experiment(learner=learner)
    state = toy_state(experiment)
    first, second = permutations(state.model).values()
    logits = second.logits
    assert logits is not None
    state.model(torch.randn(8, 24)).square().sum().backward()
    learner.step(0.1)
    kept = learner.state_dict()["optimizer"]["state"][1]
    state.step, losses = 7, iter([2.0, 3.0])
    (record,), moves = changes.harden(experiment, state, state.learners, lambda: next(losses))

    assert not first.soft and second.soft and not moves
    assert list(learner.choices) == ["4.input_permutation"]
    assert learner.half_hard
    (left,) = learner.state_dict()["optimizer"]["state"].values()
    assert all(torch.equal(left[key], kept[key]) for key in kept)
    assert record["choice"] == "0.input_permutation" and record["of"] == "permutation"
    assert record["reason"] == "deadline" and record["step"] == 7
    assert (record["loss_before"], record["loss_after"]) == (2.0, 3.0)
    assert state.average is not None
    adopted = permutations(state.average.model)[record["choice"]]
    assert torch.equal(adopted.index, first.index)
    learner.step(0.1)
    state.average.update(1)
    x = torch.randn(3, 24)
    matrix = sparse_weights(state.model)["0.weights.0"].matrix()
    assert isinstance(state.model, nn.Sequential)
    expected = x[:, first.index] @ matrix.t() + state.model[0].bias
    torch.testing.assert_close(state.model[0](x), expected)


def test_a_hard_selection_drops_the_other_units() -> None:
    experiment = toy_experiment(algorithm=Moving(), learner=from_yaml("permutation/none"))
    state = trained(experiment)
    weight = sparse_weights(state.model)["0.weights.0"]
    selection, old = weight.selection, weight.values
    assert selection is not None
    chosen = selection.nearest()
    soft = weight.matrix().detach()
    state.model.eval()
    for expected in (0, 0, 1):
        hardened, moves = changes.harden(experiment, state, state.learners, lambda: 1.0)
        assert len(hardened) == len(moves) == expected
    assert hardened[0]["of"] == "selection" and weight.selection is None
    assert torch.equal(weight.active.long(), chosen)
    assert torch.equal(weight.topology().counts(), weight.topology().target)
    assert weight.values is not old and old not in state.optimizer.state
    assert len(state.optimizer.state[weight.values]["exp_avg"]) == len(chosen)
    # What is left counts as much as it did.
    now = weight.matrix().detach()
    torch.testing.assert_close(now[now != 0], soft[now != 0])
    assert experiment.learners[1].choices == {}
    assert state.average is not None
    averaged = sparse_weights(state.average.model)["0.weights.0"]
    assert averaged.selection is None and torch.equal(averaged.active, weight.active)
    state.average.update(5)


def test_a_state_of_another_shape_than_its_weight_is_refused_before_anything_moves() -> None:
    experiment = toy_experiment(algorithm=set_algorithm())
    state = trained(experiment)
    weights = list(sparse_weights(state.model).values())
    before = [weight.active.clone() for weight in weights]
    moments = state.optimizer.state[weights[0].values]
    moments["row_var"] = torch.ones(len(weights[0].values), 1)  # as Adafactor's
    with pytest.raises(UserError, match=r"^optimizer: [^\n]*, got AgeAwareAdamW \(row_var\)$"):
        update(experiment, state)
    assert all(torch.equal(w.active, old) for w, old in zip(weights, before, strict=True))
