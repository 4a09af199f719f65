"""Every structure with every algorithm and every learner, through the real model and engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from from_yaml import from_yaml
from padst_exp.data.sampler import train_loader
from padst_exp.data.small_images import Digits
from padst_exp.dst import Algorithm, DropGrow, Gradient, Magnitude, Static, Uniform
from padst_exp.engine.distributed import World
from padst_exp.engine.state import TrainingState
from padst_exp.engine.step import Stepper
from padst_exp.layers import permutations, sparse_weights
from padst_exp.models.vision import vit
from padst_exp.permutations import DoublyStochastic, Learner, NoPermutation, RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Dense, Storage
from structure_cases import STRUCTURES

STEPS = 48
RULES = [Rule("blocks.*.attn.qkv", 3), Rule("blocks.*.attn.proj"), Rule("blocks.*.mlp.fc?")]

ALGORITHMS: dict[str, Algorithm] = {
    "static": Static(interval=8),
    "set": DropGrow(
        drop=Magnitude(), grow=Uniform(), fraction=0.5, interval=8, stop=0.75, moments="zero"
    ),
    "rigl": DropGrow(
        drop=Magnitude(), grow=Gradient(), fraction=0.5, interval=8, stop=0.75, moments="age"
    ),
}
LEARNERS: dict[str, Learner] = {
    "none": NoPermutation(),
    "random": RandomPermutation(side="auto"),
    "doubly_stochastic": DoublyStochastic(side="both", ramp_start=0.0, ramp_end=0.2, deadline=0.6),
}


@pytest.fixture(scope="module")
def digits() -> Digits:
    return from_yaml("dataset/digits")


def train(
    digits: Digits, structure: str, dst: str, learner: str, storage: Storage, precision: str
) -> tuple[nn.Module, list[float], list[Mapping[str, Any]]]:
    """Train a tiny ViT; the model, the losses and the hardenings. Checks budgets at every step."""
    torch.manual_seed(0)
    model = vit(
        name="vit_tiny_patch16_224", pretrained=False, checkpoint=None, patch_size=4, dim=32,
        depth=1, heads=2, mlp_ratio=2.0, drop_path=0.0, layer_scale=None, **digits.model_shape,
    )  # fmt: skip
    sparsify(
        model, RULES, structure=STRUCTURES.get(structure, Dense()), density=0.3,
        learner=LEARNERS[learner], storage=storage,
    )  # fmt: skip
    if precision == "float64":
        model.double()
    trainer = from_yaml("trainer/default", steps=STEPS, batch_size=32, precision=precision)
    hardened: list[Mapping[str, Any]] = []
    state = TrainingState(
        model=model.train(), optimizer=from_yaml("optimizer/adamw", lr=0.004, warmup=0.1),
        learner=LEARNERS[learner],
        ema_decay=None, total=STEPS, world=World(), saved=None, path=Path(),
    )  # fmt: skip
    stepper = Stepper(
        state, task=digits, algorithm=ALGORITHMS[dst], learner=LEARNERS[learner], trainer=trainer,
        world=World(), seed=0, total=STEPS, say=lambda line: None,
        record=lambda kind, values: hardened.append(values) if kind == "harden" else None,
    )  # fmt: skip
    batches = iter(
        train_loader(
            digits, batch_size=32, micro_batches=1, start_step=0, total_steps=STEPS, seed=0,
            rank=0, world_size=1, workers=0,
        )
    )  # fmt: skip
    weights = sparse_weights(model)
    started = {name: weight.active.clone() for name, weight in weights.items()}
    initial = {name: weight.dense() for name, weight in weights.items()}
    for _ in range(STEPS):
        stepper.step(batches)
        for weight in weights.values():
            topology = weight.topology()
            assert torch.equal(topology.counts(), weight.layout.counts)
    stepper.settle()
    moved = any(not torch.equal(started[name], weights[name].active) for name in weights)
    may_move = any(
        not weight.static and bool((weight.layout.counts < weight.layout.candidates).any())
        for weight in weights.values()
    )
    assert moved == (dst != "static" and may_move)
    # The rest of the model learns too; the sparse layers must have taken part.
    assert all(not torch.equal(initial[name], weights[name].dense()) for name in weights)
    return model, state.losses, hardened


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("dst", ALGORITHMS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_trains_keeps_its_budgets_and_hardens(
    digits: Digits, structure: str, dst: str, learner: str
) -> None:
    model, losses, hardened = train(digits, structure, dst, learner, "packed", "float32")
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    found = permutations(model)
    assert bool(found) == (learner != "none")
    assert len(hardened) == (len(found) if learner == "doubly_stochastic" else 0)
    for permutation in found.values():
        assert not permutation.soft
        assert torch.equal(permutation.index.sort().values, torch.arange(permutation.size))
    for weight in sparse_weights(model).values():
        assert int((weight.dense() != 0).sum()) <= weight.layout.num_entries


def test_dense_trains_through_the_same_engine(digits: Digits) -> None:
    model, losses, hardened = train(
        digits, "dense", "rigl", "doubly_stochastic", "packed", "float32"
    )
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert not sparse_weights(model) and not permutations(model) and not hardened


@pytest.mark.parametrize("dst", ["set", "rigl"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed_and_masked_storage_train_alike(digits: Digits, structure: str, dst: str) -> None:
    packed, losses, _ = train(digits, structure, dst, "doubly_stochastic", "packed", "float64")
    masked, expected, _ = train(digits, structure, dst, "doubly_stochastic", "masked", "float64")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-8, rtol=0)
    ours, theirs = sparse_weights(packed), sparse_weights(masked)
    for name in ours:
        assert torch.equal(ours[name].active, theirs[name].active)
        torch.testing.assert_close(ours[name].dense(), theirs[name].dense(), atol=1e-7, rtol=0)
