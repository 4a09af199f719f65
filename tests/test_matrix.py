"""Every structure with every algorithm and every learner, through the real model and engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dst_cases import rigl, set_algorithm
from from_yaml import from_yaml
from padst_exp.data.sampler import train_loader
from padst_exp.data.small_images import Digits
from padst_exp.dst import Algorithm, Static
from padst_exp.engine.distributed import World
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.loggers import NoLogger
from padst_exp.engine.placement import Placement
from padst_exp.engine.state import TrainingState
from padst_exp.engine.step import Stepper
from padst_exp.layers import permutations, sparse_weights
from padst_exp.models.vision import vit
from padst_exp.permutations import NoPermutation, PermutationLearner, RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Dense, Storage
from permutation_cases import learned
from structure_cases import STRUCTURES

STEPS = 48
RULES = [Rule("blocks.*.attn.qkv", 3), Rule("blocks.*.attn.proj"), Rule("blocks.*.mlp.fc?")]

ALGORITHMS: dict[str, Algorithm] = {
    "static": Static(),
    "set": set_algorithm(fraction=0.5, interval=8, stop=0.75, moments="zero"),
    "rigl": rigl(fraction=0.5, interval=8, stop=0.75, moments="age"),
}
LEARNERS: dict[str, PermutationLearner] = {
    "none": NoPermutation(),
    "random": RandomPermutation(side="auto"),
    "doubly_stochastic": learned(ramp_start=0.0, ramp_end=0.2, interval=8),
}


@pytest.fixture(scope="module")
def digits() -> Digits:
    task: Digits = from_yaml("dataset/digits")
    return task


def train(
    digits: Digits, structure: str, dst: str, learner: str, storage: Storage, precision: str
) -> tuple[nn.Module, list[float], list[Mapping[str, Any]]]:
    """Train a tiny ViT; the model, the losses and the hardenings. Checks budgets at every step."""
    torch.manual_seed(0)
    model = vit(
        name="vit_tiny_patch16_224", pretrained=False, checkpoint=None, patch_size=4, dim=32,
        depth=1, heads=2, mlp_ratio=2.0, drop_path=0.0, layer_scale=None, **digits.model_shape,
    )  # fmt: skip
    algorithm = ALGORITHMS[dst]
    report = sparsify(
        model, RULES, structure=STRUCTURES.get(structure, Dense()), density=0.3,
        learner=LEARNERS[learner], algorithm=algorithm, storage=storage,
    )  # fmt: skip
    if precision == "float64":
        model.double()
    experiment = Experiment(
        task=digits, model=model, report=report, algorithm=algorithm, learner=LEARNERS[learner],
        optimizer=from_yaml("optimizer/adamw", lr=0.004, warmup=0.1),
        trainer=from_yaml("trainer/default", steps=STEPS, batch_size=32, precision=precision),
        logger=NoLogger(), seed=0, backend="native" if storage == "packed" else "torch",
    )  # fmt: skip
    state = TrainingState(experiment, placement=Placement(World()), saved=None, path=Path())
    hardened: list[Mapping[str, Any]] = []
    stepper = Stepper(
        experiment, state, say=lambda line: None,
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
    initial = {name: weight.matrix().detach() for name, weight in weights.items()}
    for _ in range(STEPS):
        stepper.step(batches)
        for weight in weights.values():
            assert torch.equal(weight.topology().counts(), weight.target)
    stepper.settle()
    moved = any(not torch.equal(started[name], weights[name].active) for name in weights)
    assert moved == any(not row.static for row in report.layers)
    assert dst != "static" or not moved
    # The rest of the model learns too; the sparse layers must have taken part.
    assert all(not torch.equal(initial[name], weights[name].matrix()) for name in weights)
    assert sum(state.losses[-5:]) < 0.85 * sum(state.losses[:5]), (structure, dst, learner)
    found = permutations(model)
    assert bool(found) == (learner != "none" and structure != "dense")
    assert len(hardened) == (len(found) if learner == "doubly_stochastic" else 0)
    for permutation in found.values():
        assert not permutation.soft
        assert torch.equal(permutation.index.sort().values, torch.arange(permutation.size))
    for row, weight in zip(report.layers, weights.values(), strict=True):
        assert int((weight.matrix() != 0).sum()) <= row.parameters == weight.topology().num_entries
    return model, state.losses, hardened


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_trains_keeps_its_budgets_and_hardens_packed_as_masked(
    digits: Digits, structure: str
) -> None:
    others = [("static", "random"), ("set", "none"), ("rigl", "random"), ("set", "random")]
    dst, learner = others[list(STRUCTURES).index(structure) % 4]
    train(digits, structure, dst, learner, "packed", "float32")
    arguments = digits, structure, "rigl", "doubly_stochastic"
    packed, losses, _ = train(*arguments, "packed", "float64")
    masked, expected, _ = train(*arguments, "masked", "float64")
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-8, rtol=0)
    ours, theirs = sparse_weights(packed), sparse_weights(masked)
    for name in ours:
        assert torch.equal(ours[name].active, theirs[name].active)
        torch.testing.assert_close(ours[name].matrix(), theirs[name].matrix(), atol=1e-7, rtol=0)


def test_dense_trains_through_the_same_engine(digits: Digits) -> None:
    model, _, _ = train(digits, "dense", "rigl", "doubly_stochastic", "packed", "float32")
    assert not sparse_weights(model) and not permutations(model)
