"""Relaxed permutations of other forms than one doubly stochastic matrix."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from from_yaml import from_yaml
from padst_exp.errors import UserError
from padst_exp.permutations import (
    DrawnPermutation,
    GumbelSinkhorn,
    Permutation,
    PermutationLearner,
)
from padst_exp.permutations.kaleidoscope import network

NAMES = ("grouped", "kaleidoscope", "gumbel_sinkhorn")
SIZES = (2, 5, 13, 32)


def learner(name: str, **changes: object) -> PermutationLearner:
    small = {"group": 4, "interval": 1} if name == "grouped" else {"interval": 1}
    made: PermutationLearner = from_yaml(f"permutation/{name}", **small | changes)
    return made


def fresh(name: str, size: int, seed: int = 0) -> Permutation:
    made = learner(name).create(size, torch.Generator().manual_seed(seed))
    assert made is not None and made.soft
    return made


def test_a_layer_computes_with_the_doubly_stochastic_matrix_and_its_gradients() -> None:
    for name in NAMES:
        for size in SIZES:
            permutation = fresh(name, size).double()
            matrix = permutation.matrix()
            torch.testing.assert_close(matrix.sum(0), torch.ones(size).double())
            torch.testing.assert_close(matrix.sum(1), torch.ones(size).double(), atol=1e-2, rtol=0)
            assert bool((matrix >= 0).all())
            x = torch.randn(2, 3, size, dtype=torch.float64, requires_grad=True)
            torch.testing.assert_close(permutation(x), x @ matrix.T)
            assert permutation.logits is not None
            weights = torch.randn(2, 3, size, dtype=torch.float64)
            ours = torch.autograd.grad((permutation(x) * weights).sum(), (x, permutation.logits))
            theirs = torch.autograd.grad(
                (x @ permutation.matrix().T * weights).sum(), (x, permutation.logits)
            )
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other)


def of_logits(permutation: Permutation, method: str, values: torch.Tensor) -> torch.Tensor:
    """What a method computes with these logits, differentiable in them."""
    logits = permutation._parameters.pop("logits")
    permutation.logits = values  # type: ignore[assignment]
    result: torch.Tensor = getattr(permutation, method)()
    del permutation.__dict__["logits"]
    permutation.logits = logits
    return result


def test_gradients_of_logits_are_those_of_finite_differences() -> None:
    for name in NAMES:
        permutation = fresh(name, 5).double()
        assert permutation.logits is not None
        logits = permutation.logits.detach().clone().requires_grad_()
        for method in ("matrix", "penalty"):
            function = partial(of_logits, permutation, method)
            assert torch.autograd.gradcheck(function, logits)


def test_sharp_ones_are_permutations_and_round_to_themselves() -> None:
    for name in NAMES:
        for size in SIZES:
            permutation = fresh(name, size).eval()
            assert 0 < float(permutation.penalty().detach()) < 1 + 1e-6
            assert permutation.logits is not None
            permutation.logits.data *= 100
            for _ in range(1000):  # small where rows are nearly tied
                permutation.project_()
            matrix, nearest = permutation.matrix().detach(), permutation.nearest()
            assert torch.equal(nearest.sort().values, torch.arange(size))
            assert float(matrix[torch.arange(size), nearest].mean()) > 0.9
            assert float(permutation.penalty().detach()) < 0.1
            permutation.harden()
            assert torch.equal(permutation.index, nearest) and float(permutation.penalty()) == 0
            assert torch.equal(permutation.matrix(), torch.eye(size)[nearest])


def test_a_network_of_switches_can_be_set_to_every_permutation() -> None:
    for size in (2, 3, 5, 6):
        stages = network(list(range(size)))
        assert len(stages) == 2 * math.ceil(math.log2(size)) - 1
        reached = {tuple(range(size))}
        for pairs in stages:
            assert len({line for pair in pairs for line in pair}) == 2 * len(pairs)
            for one, other in pairs:
                swap = {one: other, other: one}
                reached |= {tuple(lines[swap.get(i, i)] for i in range(size)) for lines in reached}
        assert len(reached) == math.factorial(size)


def test_states_restore_soft_and_hard_ones() -> None:
    for name in NAMES:
        source = nn.Sequential(fresh(name, 13))
        target = nn.Sequential(fresh(name, 13))
        assert isinstance(source[0], Permutation) and isinstance(target[0], Permutation)
        assert source[0].logits is not None
        source[0].logits.data += 0.1
        if isinstance(source[0], DrawnPermutation):
            source[0].draw()
            source[0].temperature.fill_(0.3)
        target.load_state_dict(source.state_dict())
        assert torch.equal(source[0].matrix(), target[0].matrix())
        source[0].harden()
        target.load_state_dict(source.state_dict())
        assert torch.equal(source[0].index, target[0].index) and not list(target.parameters())


def test_noise_is_drawn_for_each_step_and_not_in_evaluation() -> None:
    permutation = fresh("gumbel_sinkhorn", 13)
    trained = learner("gumbel_sinkhorn", noise=1.0)
    assert isinstance(trained, GumbelSinkhorn)
    trained.start({"p": permutation})
    same, twin = permutation.matrix(), copy.deepcopy(permutation)
    assert torch.equal(same, permutation.matrix()) and torch.equal(same, twin.matrix())
    quiet = permutation.eval().matrix().detach()
    permutation.train()
    assert not torch.equal(quiet, same)
    trained.zero_grad()
    permutation(torch.randn(4, 13)).square().sum().backward()
    trained.step(0.0)
    assert not torch.allclose(permutation.matrix(), same)


def test_the_temperature_falls_geometrically_until_the_deadline() -> None:
    trained = learner("gumbel_sinkhorn", temperature=1.0, final_temperature=0.01, deadline=0.4)
    permutation = trained.create(5, torch.Generator().manual_seed(0))
    assert isinstance(permutation, DrawnPermutation)
    trained.start({"p": permutation})
    for progress, temperature in ((0.0, 1.0), (0.2, 0.1), (0.4, 0.01), (0.9, 0.01)):
        trained.step(progress)
        assert float(permutation.temperature) == pytest.approx(temperature)
    permutation.temperature.fill_(10.0)
    assert trained.ready(permutation, 0.39) is None
    assert trained.ready(permutation, 0.4) == "deadline"


def test_a_start_scaled_with_the_width_leaves_the_same_at_every_width() -> None:
    for size in (33, 96, 400):
        wide = from_yaml("permutation/doubly_stochastic", init="width", scale=0.25)
        plain = from_yaml("permutation/doubly_stochastic", init="lognormal", scale=1.0)
        generator = torch.Generator().manual_seed(size)
        # A finite sample seldom holds the rare large entries, so it leaves a little less.
        assert 0.15 < float(wide.create(size, generator).gain()) < 0.3
        expected = math.sqrt((math.e - 1) / size)
        assert float(plain.create(size, generator).gain()) == pytest.approx(expected, rel=0.25)


def test_bad_hyper_parameters_are_named() -> None:
    cases: list[tuple[str, str, object]] = [
        ("grouped", "group", 1), ("grouped", "scale", 0.0), ("grouped", "iterations", 0),
        ("kaleidoscope", "scale", 0.0), ("kaleidoscope", "delta", 1.0),
        ("gumbel_sinkhorn", "noise", -1.0), ("gumbel_sinkhorn", "temperature", 0.01),
        ("gumbel_sinkhorn", "final_temperature", 0.0), ("gumbel_sinkhorn", "deadline", 0.0),
        ("gumbel_sinkhorn", "lr", 0.0),
    ]  # fmt: skip
    for name, key, value in cases:
        with pytest.raises(UserError) as error:
            learner(name, **{key: value})
        message = str(error.value)
        assert message.startswith(f"permutation.{key}: expected ")
        assert message.endswith(f"got {value}") and "\n" not in message
    with pytest.raises(UserError, match=r"^permutation\.scale: expected a gain below 1 with "):
        from_yaml("permutation/doubly_stochastic", init="width", scale=1.0)
