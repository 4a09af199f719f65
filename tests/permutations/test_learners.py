import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from padst_exp.errors import UserError
from padst_exp.permutations import (
    DoublyStochastic,
    Learner,
    NoPermutation,
    Permutation,
    RandomPermutation,
)
from padst_exp.permutations import learners as module

PROJECTED = DoublyStochastic(
    parametrization="projected",
    init="noise",
    scale=0.1,
    lr=0.01,
    weight=10.0,
    ramp_start=0.1,
    ramp_end=0.5,
)
FORMS = pytest.mark.parametrize(
    "learner", [DoublyStochastic(), PROJECTED], ids=["logits", "projected"]
)


def fresh(learner: Learner, size: int, seed: int = 0) -> Permutation:
    permutation = learner.create(size, torch.Generator().manual_seed(seed))
    assert permutation is not None
    return permutation


def gradient(permutation: Permutation) -> torch.Tensor:
    assert permutation.logits is not None and permutation.logits.grad is not None
    return permutation.logits.grad


def penalty_gradient(permutation: Permutation) -> torch.Tensor:
    assert permutation.logits is not None
    (grad,) = torch.autograd.grad(permutation.penalty(), permutation.logits)
    return grad


def test_no_permutation_creates_nothing() -> None:
    assert NoPermutation().create(8, torch.Generator()) is None


def test_random_permutation_follows_the_generator() -> None:
    learner = RandomPermutation(side="in")
    first, again, other = fresh(learner, 33), fresh(learner, 33), fresh(learner, 33, seed=1)
    assert not first.soft and first.agreement() == 1
    assert torch.equal(first.index, again.index) and not torch.equal(first.index, other.index)


@FORMS
def test_creation_follows_the_generator(learner: DoublyStochastic) -> None:
    first, again, other = fresh(learner, 33), fresh(learner, 33), fresh(learner, 33, seed=1)
    assert torch.equal(first.matrix(), again.matrix())
    assert not torch.equal(first.matrix(), other.matrix())


def test_noise_starts_near_uniform_and_lognormal_does_not() -> None:
    noise = fresh(DoublyStochastic(init="noise", scale=0.1), 64)
    assert noise.penalty() > 0.99 > 0.95 > fresh(DoublyStochastic(), 64).penalty()


def test_one_feature_needs_no_learning() -> None:
    assert not fresh(DoublyStochastic(), 1).soft


@FORMS
@pytest.mark.parametrize("size", [5, 33])
def test_a_planted_permutation_is_learned(learner: DoublyStochastic, size: int) -> None:
    """The whole life: soft, sharpened, hard under delta; and it finds what was there."""
    steps, planted = 200, torch.randperm(size)
    permutation = fresh(learner, size)
    assert permutation.logits is not None
    optimizer = learner.optimizer([permutation.logits])
    for step in range(1, steps + 1):
        x = torch.randn(64, size)
        optimizer.zero_grad()
        (permutation(x) - x[:, planted]).square().mean().backward()
        learner.regularize([permutation], (step - 1) / steps)
        optimizer.step()
        learner.project([permutation])
        why = learner.ready(permutation, step / steps)
        if why is not None:
            break
    assert why == "delta" and permutation.penalty() < learner.delta
    assert permutation.agreement() < 0.9
    permutation.harden()
    assert (permutation.index == planted).double().mean() > 0.9
    learner.regularize([permutation], 1.0)
    learner.project([permutation])
    assert learner.ready(permutation, 1.0) is None


@FORMS
def test_the_penalty_alone_hardens(learner: DoublyStochastic) -> None:
    """A matrix that feeds dead weights only gets no task gradient, none at all or zeros."""
    for absent in (True, False):
        permutation = fresh(learner, 33)
        assert permutation.logits is not None
        optimizer = learner.optimizer([permutation.logits])
        for step in range(200):
            permutation.logits.grad = None if absent else torch.zeros(33, 33)
            learner.regularize([permutation], step / 200)
            optimizer.step()
            learner.project([permutation])
        assert learner.ready(permutation, 0.5) == "delta"


def test_deadline_forces() -> None:
    learner = DoublyStochastic(deadline=0.6)
    permutation = fresh(learner, 33)
    assert learner.ready(permutation, 0.59) is None
    assert learner.ready(permutation, 0.6) == "deadline"
    sharp = Permutation(100 * torch.eye(33))
    assert learner.ready(sharp, 0.6) == "delta"


@pytest.mark.parametrize("task_scale", [1e-6, 1.0, 1e4])
def test_adaptive_penalty_is_a_fixed_multiple_of_the_task(task_scale: float) -> None:
    learner = DoublyStochastic(weight=3.0, ramp_start=0.1, ramp_end=0.5)
    permutation = fresh(learner, 33)
    task = task_scale * torch.randn(33, 33)
    assert permutation.logits is not None
    permutation.logits.grad = task.clone()
    learner.regularize([permutation], 0.2)
    added = gradient(permutation) - task

    def tangent_norm(x: torch.Tensor) -> torch.Tensor:
        centre = torch.eye(33) - 1 / 33
        return (centre @ x @ centre).norm()

    # A quarter of the way up the ramp c = 0.75.
    torch.testing.assert_close(tangent_norm(added), 0.75 * tangent_norm(task), rtol=1e-3, atol=0)
    cosine = torch.cosine_similarity(added.flatten(), penalty_gradient(permutation).flatten(), 0)
    assert cosine > 0.999


def test_fixed_penalty_is_added_as_it_is() -> None:
    learner = DoublyStochastic(weighting="fixed", weight=2.0, ramp_start=0.1, ramp_end=0.5)
    permutation = fresh(learner, 33)
    learner.regularize([permutation], 0.3)
    torch.testing.assert_close(gradient(permutation), penalty_gradient(permutation))


def test_nothing_is_added_before_the_ramp() -> None:
    permutation = fresh(DoublyStochastic(), 33)
    assert permutation.logits is not None
    DoublyStochastic().regularize([permutation], 0.05)
    assert permutation.logits.grad is None


def test_matrices_are_clipped_one_by_one() -> None:
    permutations = [fresh(DoublyStochastic(), 33, seed=seed) for seed in range(2)]
    for permutation, scale in zip(permutations, (1e-3, 10.0), strict=True):
        assert permutation.logits is not None
        permutation.logits.grad = scale * torch.ones(33, 33)
    DoublyStochastic(clip=1.0).regularize(permutations, 0.0)
    small, large = (float(gradient(permutation).norm()) for permutation in permutations)
    assert small == pytest.approx(33e-3) and large == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("side", "left"),
        ("parametrization", "soft"),
        ("iterations", 0),
        ("init", "uniform"),
        ("scale", 0.0),
        ("lr", 0.0),
        ("betas", (0.9, 1.0)),
        ("weighting", "none"),
        ("weight", -1.0),
        ("ramp_start", -0.1),
        ("ramp_end", 0.01),
        ("ramp_end", 1.1),
        ("delta", 0.0),
        ("delta", 1.0),
        ("deadline", 0.0),
        ("clip", 0.0),
        ("lr", float("nan")),
    ],
)
def test_bad_hyper_parameters_are_named(key: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        DoublyStochastic(**{key: value})  # type: ignore[arg-type]
    message = str(error.value)
    assert message.startswith(f"permutation.{key}: expected ") and message.endswith(f"got {value}")
    assert "\n" not in message


def test_bad_side_of_a_random_permutation_is_named() -> None:
    with pytest.raises(
        UserError, match=r"^permutation\.side: expected in, out, both or auto, got left"
    ):
        RandomPermutation(side="left")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["none", "random", "doubly_stochastic"])
def test_yaml_shows_every_default(name: str) -> None:
    folder = Path(__file__).parents[2] / "conf" / "permutation"
    knobs = OmegaConf.to_object(OmegaConf.load(folder / f"{name}.yaml"))
    assert isinstance(knobs, dict)
    target = getattr(module, knobs.pop("_target_").removeprefix("padst_exp.permutations."))
    parameters = inspect.signature(target).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    if "betas" in knobs:
        knobs["betas"] = tuple(knobs["betas"])
    assert knobs == defaults
