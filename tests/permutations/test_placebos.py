"""Placebos have the soft phase of a learned permutation, and end as a random one."""

from typing import Any

import torch

from from_yaml import from_yaml
from padst_exp.permutations import DoublyStochastic, DrawnTarget, is_bijection

SIZE, STEPS = 33, 200


def life(name: str, planted: torch.Tensor, **changes: Any) -> tuple[Any, list[float], int]:
    """A permutation that learns to be `planted` until it is ready; its penalties, and the step."""
    learner = from_yaml(f"permutation/{name}", **changes)
    assert isinstance(learner, DoublyStochastic)
    permutation = learner.create(SIZE, torch.Generator().manual_seed(0))
    assert permutation is not None
    learner.start({"it": permutation})
    torch.manual_seed(0)
    penalties = []
    for step in range(1, STEPS + 1):
        x = torch.randn(64, SIZE)
        learner.zero_grad()
        (permutation(x) - x[:, planted]).square().mean().backward()
        learner.step((step - 1) / STEPS)
        penalties.append(permutation.penalty().item())
        if learner.ready(permutation, step / STEPS) is not None:
            break
    return permutation, penalties, step


def test_a_random_target_is_reached_whatever_the_task_says() -> None:
    projected = {"parametrization": "projected", "init": "noise", "scale": 0.1, "lr": 0.01}
    for changes in ({}, {**projected, "weight": 10.0, "ramp_start": 0.1, "ramp_end": 0.5}):
        planted = torch.randperm(SIZE)
        permutation, _, step = life("random_target", planted, **changes)
        assert isinstance(permutation, DrawnTarget) and step < STEPS * 0.6
        permutation.harden()
        assert (permutation.index == permutation.drawn).double().mean() > 0.8
        assert (permutation.index == planted).double().mean() < 0.3


def test_a_shuffled_one_lives_as_a_learned_one_and_ends_as_another() -> None:
    planted = torch.randperm(SIZE)
    learned, wanted, end = life("doubly_stochastic", planted)
    shuffled, penalties, step = life("shuffled", planted)
    assert penalties == wanted and step == end
    learned.harden()
    shuffled.harden()
    assert torch.equal(shuffled.index, learned.index[shuffled.drawn])
    assert is_bijection(shuffled.index) and not torch.equal(shuffled.index, learned.index)
    again = shuffled.index.clone()
    shuffled.harden()
    assert torch.equal(shuffled.index, again)
