from typing import Literal

import pytest
import torch
from torch import nn

from engine.toy import toy_learner
from from_yaml import from_yaml
from padst_exp.dst import DropGrow, Magnitude, Uniform
from padst_exp.engine import topology
from padst_exp.engine.distributed import World
from padst_exp.engine.ema import Average
from padst_exp.layers import SparseWeight, permutations, sparse_weights
from padst_exp.permutations import DoublyStochastic, Permutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Block, scatter_entries


def sparse_model(storage: Literal["packed", "masked"] = "packed") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2))
    structure = Block(size=4, balanced=False)
    sparsify(
        model,
        [Rule("0"), Rule("2")],
        structure=structure,
        density=0.5,
        learner=toy_learner(side="in"),
        storage=storage,
    )
    return model


def as_dense(weight: SparseWeight, tensor: torch.Tensor) -> torch.Tensor:
    if weight.storage == "masked":
        return tensor.clone()
    entries = weight.layout.entries(weight.active.long())
    return scatter_entries(tensor.expand(entries.shape), entries, weight.layout.shape)


@pytest.mark.parametrize("storage", ["packed", "masked"])
@pytest.mark.parametrize("moments", ["age", "zero"])
def test_state_moves_with_the_units(storage: str, moments: str) -> None:
    model = sparse_model(storage)
    optimizer, _ = from_yaml("optimizer/adamw", lr=0.01).create(model, 100)
    average = Average(model, decay=0.5)
    for step in range(1, 4):
        model(torch.randn(8, 24)).square().sum().backward()
        optimizer.step()
        average.update(step)
    before = {}
    for name, weight in sparse_weights(model).items():
        state = optimizer.state[weight.values]
        before[name] = {key: as_dense(weight, state[key]) for key in ("exp_avg", "exp_avg_sq")}
        before[name]["active"] = as_dense(weight, torch.ones_like(weight.values)) != 0
        before[name]["average"] = sparse_weights(average.model)[name].dense()
        before[name]["values"] = weight.dense()

    algorithm = DropGrow(
        drop=Magnitude(), grow=Uniform(), fraction=0.6, interval=3, stop=1.0, moments=moments
    )
    tracker = topology.TopologyTracker(sparse_weights(model))
    replaced = topology.rewire(
        model, algorithm, optimizer, average, tracker, step=3, total=100, seed=0, world=World()
    )
    assert replaced > 0 and tracker.rewires == 1
    for name, weight in sparse_weights(model).items():
        old, state = before[name], optimizer.state[weight.values]
        entries = weight.layout.entries(weight.active.long())
        active = (
            scatter_entries(
                torch.ones_like(entries, dtype=torch.float), entries, weight.layout.shape
            )
            != 0
        )
        mine = sparse_weights(average.model)[name]
        assert torch.equal(mine.active, weight.active)
        now = {
            "values": weight.dense(),
            "average": mine.dense(),
            **{key: as_dense(weight, state[key]) for key in ("exp_avg", "exp_avg_sq")},
        }
        kept = active & (old["values"] != 0)
        assert kept.any() and not kept[active].all()
        for key, dense in now.items():
            assert torch.equal(dense[kept], old[key][kept]), key
            assert (dense[~kept] == 0).all(), key
        assert ("birth" in state) == (moments == "age")
        if moments == "age":
            birth = as_dense(weight, state["birth"])
            assert (birth[kept] == 0).all() and (birth[active & ~kept] == 1).all()
            assert state["births"].tolist() == [0, 3]
        assert state["step"] == 3 and weight.dense_gradient is None
    model(torch.randn(8, 24)).sum().backward()
    optimizer.step()
    average.update(4)


def test_rewiring_depends_on_seed_and_step_only() -> None:
    def rewired(seed: int, step: int) -> str:
        model = sparse_model()
        optimizer, _ = from_yaml("optimizer/adamw", lr=0.01).create(model, 100)
        torch.rand(seed + step)  # whatever else was drawn before
        algorithm = DropGrow(
            drop=Magnitude(), grow=Uniform(), fraction=0.6, interval=1, stop=1.0, moments="age"
        )
        tracker = topology.TopologyTracker(sparse_weights(model))
        topology.rewire(
            model,
            algorithm,
            optimizer,
            None,
            tracker,
            step=step,
            total=100,
            seed=seed,
            world=World(),
        )
        return topology.topology_digest(model)

    assert rewired(0, 1) == rewired(0, 1)
    assert len({rewired(0, 1), rewired(0, 2), rewired(1, 1)}) == 3


def test_hardening_one_of_two_keeps_the_state_of_the_other() -> None:
    model = sparse_model()
    average = Average(model, decay=0.5)
    first, second = permutations(model).values()
    optimizer = toy_learner().optimizer([first.logits, second.logits])
    model(torch.randn(8, 24)).square().sum().backward()
    optimizer.step()
    moments = optimizer.state[second.logits]["exp_avg"].clone()

    class FirstOnly(DoublyStochastic):
        def ready(self, permutation: Permutation, progress: float) -> Literal["deadline"] | None:
            return "deadline" if permutation is first else None

    losses = iter([2.0, 3.0])
    (record,) = topology.harden(
        model,
        FirstOnly(),
        optimizer,
        average,
        lambda: next(losses),
        step=7,
        progress=0.1,
        world=World(),
    )
    assert not first.soft and second.soft
    assert list(optimizer.state) == [second.logits]
    assert torch.equal(optimizer.state[second.logits]["exp_avg"], moments)
    assert record["reason"] == "deadline" and record["step"] == 7
    assert (record["loss_before"], record["loss_after"]) == (2.0, 3.0)
    adopted = permutations(average.model)[record["permutation"]]
    assert torch.equal(adopted.index, first.index)
    optimizer.step()
    average.update(1)
    x = torch.randn(3, 24)
    torch.testing.assert_close(
        model[0](x),
        x[:, first.index] @ sparse_weights(model)["0.weights.0"].dense().t() + model[0].bias,
    )
