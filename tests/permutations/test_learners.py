import copy

import pytest
import torch

from padst_exp.errors import UserError
from padst_exp.permutations import (
    DoublyStochastic,
    NoPermutation,
    Permutation,
    PermutationLearner,
    RandomPermutation,
)
from permutation_cases import learned


def forms() -> list[DoublyStochastic]:
    """Through Sinkhorn, and the paper's projected entries with the settings that suit them."""
    projected = learned(
        parametrization="projected", init="noise", scale=0.1, lr=0.01, weight=10.0, ramp_start=0.1,
        ramp_end=0.5,
    )  # fmt: skip
    return [learned(), projected]


def fresh(learner: PermutationLearner, size: int, seed: int = 0) -> Permutation:
    permutation = learner.create(size, torch.Generator().manual_seed(seed))
    assert permutation is not None
    return permutation


def started(learner: DoublyStochastic, *permutations: Permutation) -> DoublyStochastic:
    learner.start({str(i): permutation for i, permutation in enumerate(permutations)})
    return learner


def gradient(permutation: Permutation) -> torch.Tensor:
    assert permutation.logits is not None and permutation.logits.grad is not None
    return permutation.logits.grad


def penalty_gradient(permutation: Permutation) -> torch.Tensor:
    assert permutation.logits is not None
    (grad,) = torch.autograd.grad(permutation.penalty(), permutation.logits)
    return grad


def test_creation_follows_the_generator() -> None:
    for learner in (RandomPermutation(side="in"), *forms()):
        first, again, other = fresh(learner, 33), fresh(learner, 33), fresh(learner, 33, seed=1)
        assert torch.equal(first.matrix(), again.matrix()) and first.agreement() == 1
        assert not torch.equal(first.matrix(), other.matrix())
        assert first.soft == isinstance(learner, DoublyStochastic)
    assert NoPermutation().create(8, torch.Generator()) is None
    # One feature needs no learning.
    assert not fresh(learned(), 1).soft


def test_noise_starts_near_uniform_and_lognormal_does_not() -> None:
    noise = fresh(learned(init="noise", scale=0.1), 64)
    assert noise.penalty() > 0.99 > 0.95 > fresh(learned(), 64).penalty()


def test_a_planted_permutation_is_learned() -> None:
    """The whole life: soft, sharpened, hard under delta; and it finds what was there."""
    for learner in forms():
        for size in (5, 33):
            torch.manual_seed(0)
            steps, planted = 200, torch.randperm(size)
            permutation = fresh(learner, size)
            started(learner, permutation)
            for step in range(1, steps + 1):
                x = torch.randn(64, size)
                learner.zero_grad()
                (permutation(x) - x[:, planted]).square().mean().backward()
                learner.step((step - 1) / steps)
                why = learner.ready(permutation, step / steps)
                if why is not None:
                    break
            assert why == "delta" and permutation.penalty() < learner.delta
            assert permutation.agreement() < 0.9
            logits = permutation.logits
            assert logits is not None
            permutation.harden()
            learner.release("0", logits)
            assert (permutation.index == planted).double().mean() > 0.9
            learner.step(1.0)  # nobody is left to train
            assert not learner.choices and learner.state_dict()["optimizer"] is None


def test_the_penalty_alone_hardens() -> None:
    """A matrix that feeds dead weights only gets no task gradient, none at all or zeros."""
    for learner in forms():
        for absent in (True, False):
            permutation = fresh(learner, 33)
            started(learner, permutation)
            for step in range(200):
                assert permutation.logits is not None
                permutation.logits.grad = None if absent else torch.zeros(33, 33)
                learner.step(step / 200)
            assert learner.ready(permutation, 0.5) == "delta"


def test_a_deadline_forces() -> None:
    learner = learned(deadline=0.6)
    permutation = fresh(learner, 33)
    assert learner.ready(permutation, 0.59) is None
    assert learner.ready(permutation, 0.6) == "deadline"
    sharp = Permutation(100 * torch.eye(33))
    assert learner.ready(sharp, 0.6) == "delta"


def test_an_adaptive_penalty_is_a_fixed_multiple_of_the_task() -> None:
    def tangent_norm(x: torch.Tensor) -> torch.Tensor:
        centre = torch.eye(33) - 1 / 33
        return (centre @ x @ centre).norm()

    learner = learned(weight=3.0, ramp_start=0.1, ramp_end=0.5)
    for task_scale in (1e-6, 1.0, 1e4):
        permutation = fresh(learner, 33)
        started(learner, permutation)
        task = task_scale * torch.randn(33, 33)
        assert permutation.logits is not None
        permutation.logits.grad = task.clone()
        learner.regularize(0.2)
        added = gradient(permutation) - task
        # A quarter of the way up the ramp c = 0.75.
        torch.testing.assert_close(
            tangent_norm(added), 0.75 * tangent_norm(task), rtol=1e-3, atol=0
        )
        wanted = penalty_gradient(permutation).flatten()
        assert torch.cosine_similarity(added.flatten(), wanted, 0) > 0.999


def test_a_fixed_penalty_is_added_as_it_is_and_not_before_the_ramp() -> None:
    learner = learned(weighting="fixed", weight=2.0, ramp_start=0.1, ramp_end=0.5)
    permutation = fresh(learner, 33)
    started(learner, permutation).regularize(0.05)
    assert permutation.logits is not None and permutation.logits.grad is None
    learner.regularize(0.3)
    torch.testing.assert_close(gradient(permutation), penalty_gradient(permutation))


def test_matrices_are_clipped_one_by_one() -> None:
    learner = learned(clip=1.0)
    permutations = [fresh(learner, 33, seed=seed) for seed in range(2)]
    for permutation, scale in zip(permutations, (1e-3, 10.0), strict=True):
        assert permutation.logits is not None
        permutation.logits.grad = scale * torch.ones(33, 33)
    started(learner, *permutations).regularize(0.0)
    small, large = (float(gradient(permutation).norm()) for permutation in permutations)
    assert small == pytest.approx(33e-3) and large == pytest.approx(1.0, rel=1e-4)


def test_a_learner_lets_go_of_one_and_keeps_the_state_of_the_others() -> None:
    torch.manual_seed(0)
    learner = learned()
    permutations = [fresh(learner, 9, seed=seed) for seed in range(2)]
    alone, twin = learned(), copy.deepcopy(permutations[1])
    started(learner, *permutations), started(alone, twin)
    for step in range(6):
        x = torch.randn(16, 9)
        for each in (learner, alone):
            each.zero_grad()
            sum(choice(x).square().sum() for choice in each.choices.values()).backward()
            each.step(step / 10)
        if step == 2:
            logits = permutations[0].logits
            assert logits is not None
            permutations[0].harden()
            learner.release("0", logits)
    assert torch.equal(permutations[1].matrix(), twin.matrix())


def test_a_learner_goes_on_from_its_state_as_if_nothing_had_happened() -> None:
    for learner in forms():
        torch.manual_seed(0)
        permutation = fresh(learner, 9)
        started(learner, permutation)
        inputs = torch.randn(8, 16, 9)
        for step, x in enumerate(inputs):
            if step == 4:
                other = copy.deepcopy(learner)
                twin = copy.deepcopy(permutation)
                other.start({"0": twin})
                other.load_state_dict(copy.deepcopy(learner.state_dict()))
            learners = [(learner, permutation)] + ([(other, twin)] if step >= 4 else [])
            for each, choice in learners:
                each.zero_grad()
                choice(x).pow(4).sum().backward()
                each.step(step / 10)
        assert torch.equal(permutation.matrix(), twin.matrix())
        with pytest.raises(ValueError, match="another number of soft choices"):
            other.load_state_dict({"optimizer": None})


def test_bad_hyper_parameters_are_named() -> None:
    cases: list[tuple[str, object]] = [
        ("side", "left"), ("iterations", 0), ("scale", 0.0), ("lr", 0.0), ("betas", (0.9, 1.0)),
        ("weight", -1.0), ("ramp_start", -0.1), ("ramp_end", 0.01), ("ramp_end", 1.1),
        ("delta", 0.0), ("delta", 1.0), ("deadline", 0.0), ("clip", 0.0), ("lr", float("nan")),
        ("interval", 0),
    ]  # fmt: skip
    for key, value in cases:
        with pytest.raises(UserError) as error:
            learned(**{key: value})
        message = str(error.value)
        assert message.startswith(f"permutation.{key}: expected ")
        assert message.endswith(f"got {value}") and "\n" not in message
    with pytest.raises(UserError, match=r"^permutation\.side: expected in, out, both or auto, got"):
        RandomPermutation(side="left")  # type: ignore[arg-type]
