import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from padst_exp.errors import UserError
from padst_exp.permutations import Permutation
from padst_exp.permutations.permutation import is_bijection
from padst_exp.permutations.sinkhorn import project, sharpness_penalty, sinkhorn

SIZES = (5, 33, 64)
FORMS = (False, True)  # logits, projected entries


def soft(size: int, *, projected: bool = False, iterations: int = 10) -> Permutation:
    start = torch.randn(size, size)
    return Permutation(
        start.exp() if projected else start, projected=projected, iterations=iterations
    )


def reference_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        logits = logits - logits.logsumexp(1, keepdim=True)
        logits = logits - logits.logsumexp(0, keepdim=True)
    return logits.exp()


def test_hardening_gives_a_bijection_and_drops_the_matrix() -> None:
    for projected in FORMS:
        for size in SIZES:
            permutation = soft(size, projected=projected)
            nearest = permutation.nearest()
            assert (permutation.index == -1).all()
            permutation.harden()
            assert torch.equal(permutation.index.sort().values, torch.arange(size))
            assert torch.equal(permutation.index, nearest)
            assert torch.equal(permutation.initial, nearest)
            assert not permutation.soft and not list(permutation.parameters())
    with pytest.raises(AssertionError, match="not a permutation"):
        soft(5).harden(torch.tensor([0, 1, 2, 3, 3]))


def test_nearest_is_the_best_assignment_where_argmax_collides() -> None:
    # Two rows prefer column 0; the first one would lose more without it.
    matrix = torch.tensor([[0.5, 0.2, 0.3], [0.4, 0.35, 0.25], [0.1, 0.45, 0.45]])
    permutation = Permutation(matrix.log())
    assert not is_bijection(permutation.matrix().argmax(1))
    assert permutation.nearest().tolist() == [0, 1, 2]
    for projected in FORMS:
        permutation = soft(33, projected=projected)
        matrix = permutation.matrix().detach()
        _, expected = linear_sum_assignment(matrix.numpy(), maximize=True)
        assert permutation.nearest().tolist() == expected.tolist()


def test_index_means_what_the_matrix_means() -> None:
    """M of sharp logits, the index it hardens to, and (P x)[i] = x[index[i]] are one thing."""
    for projected in FORMS:
        index, x = torch.randperm(8), torch.randn(3, 8)
        start = torch.eye(8)[index] if projected else 50 * torch.eye(8)[index]
        permutation = Permutation(start, projected=projected)
        torch.testing.assert_close(permutation(x), x[:, index])
        permutation.harden()
        assert torch.equal(permutation.index, index)
        torch.testing.assert_close(x @ permutation.matrix().T, x[:, index])
        assert permutation(x) is x


def test_rows_and_columns_sum_to_one() -> None:
    for projected in FORMS:
        for size in SIZES:
            matrix = soft(size, projected=projected, iterations=30).matrix()
            torch.testing.assert_close(matrix.sum(0), torch.ones(size))
            torch.testing.assert_close(matrix.sum(1), torch.ones(size), rtol=0, atol=1e-3)
            assert (matrix >= 0).all()


def test_sinkhorn_equals_the_textbook_in_log_space() -> None:
    for iterations in (1, 2, 10):
        logits = torch.randn(7, 7, dtype=torch.float64)
        expected = reference_sinkhorn(logits, iterations)
        torch.testing.assert_close(sinkhorn(logits, iterations), expected)


def test_sinkhorn_survives_extreme_logits() -> None:
    logits = (1e4 * torch.randn(33, 33)).requires_grad_()
    matrix = sinkhorn(logits, 10)
    matrix.square().sum().backward()
    assert matrix.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
    torch.testing.assert_close(matrix.sum(0), torch.ones(33))


def sharpness(logits: Tensor, iterations: int) -> Tensor:
    return sharpness_penalty(sinkhorn(logits, iterations))


def test_gradients_of_sinkhorn_and_of_the_penalty() -> None:
    for iterations in (1, 2, 10):
        logits = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(sinkhorn, (logits, iterations))
        assert torch.autograd.gradcheck(sharpness, (logits, iterations))
    matrix = torch.rand(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sharpness_penalty, matrix)


def test_projected_entries_are_doubly_stochastic_whatever_a_step_made_of_them() -> None:
    for dim in (0, 1):
        projected = project(torch.rand(5, 5).index_fill(dim, torch.tensor([2]), -1.0), 50)
        torch.testing.assert_close(projected.sum(0), torch.ones(5))
        torch.testing.assert_close(projected.sum(1), torch.ones(5), rtol=0, atol=1e-3)
    permutation = soft(33, projected=True)
    assert permutation.logits is not None
    permutation.logits.data -= 0.02
    permutation.project_()
    torch.testing.assert_close(permutation.matrix().sum(0), torch.ones(33))
    torch.testing.assert_close(permutation.matrix().sum(1), torch.ones(33), rtol=0, atol=1e-3)


def test_normalising_sharp_logits_step_by_step_makes_them_doubly_stochastic() -> None:
    """Ten rounds leave rows far from one; kept from step to step, rounds add up."""
    permutation = Permutation(20 * torch.randn(33, 33))
    assert permutation.matrix().sum(1).sub(1).abs().max() > 0.2
    for _ in range(300):
        permutation.project_()
    torch.testing.assert_close(permutation.matrix().sum(1), torch.ones(33), rtol=0, atol=0.02)
    # Balanced ones stay as they are.
    permutation = soft(33, iterations=50)
    before = permutation.matrix()
    permutation.project_()
    torch.testing.assert_close(permutation.matrix(), before)


def test_penalty_at_uniform_and_at_a_permutation() -> None:
    for size in (2, *SIZES):
        uniform = Permutation(torch.zeros(size, size))
        torch.testing.assert_close(float(uniform.penalty().detach()), 1.0)
        sharp = Permutation(200 * torch.eye(size)[torch.randperm(size)])
        torch.testing.assert_close(float(sharp.penalty().detach()), 0.0, rtol=0, atol=1e-5)
        sharp.harden()
        assert float(sharp.penalty()) == 0


@given(scale=st.floats(0.0, 30.0), size=st.integers(2, 12), seed=st.integers(0, 10))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_penalty_lies_between_0_and_1(scale: float, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(size, size, generator=generator)
    assert -1e-5 < float(Permutation(logits).penalty().detach()) < 1 + 1e-5


def test_gain_and_agreement() -> None:
    uniform = Permutation(torch.zeros(9, 9))
    assert uniform.gain() < 1e-6
    permutation = soft(9)
    assert permutation.agreement() == 1
    permutation.harden(permutation.initial.roll(1))
    assert permutation.agreement() == 0
    assert permutation.gain() == pytest.approx(math.sqrt(8 / 9))


def test_a_state_restores_what_is_soft_and_hardens_what_was_hard() -> None:
    for projected in FORMS:
        source, target = soft(9, projected=projected), soft(9, projected=projected)
        result = target.load_state_dict(source.state_dict(), strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert target.soft and torch.equal(source.matrix(), target.matrix())
        assert torch.equal(source.initial, target.initial)
        source = nn.Sequential(nn.Linear(9, 9), soft(9, projected=projected))
        target = copy.deepcopy(source)
        source[1].harden(torch.randperm(9))
        result = target.load_state_dict(source.state_dict(), strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert not target[1].soft and torch.equal(target[1].index, source[1].index)
        assert len(list(target.parameters())) == 2
    source, target = Permutation(torch.randperm(9)), Permutation(torch.arange(9))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.index, target.index)


def test_a_state_that_is_damaged_or_too_soft_is_reported() -> None:
    state = Permutation(torch.arange(9)).state_dict()
    state["index"][3] = 4
    with pytest.raises(UserError, match=r"^index: not a permutation of 9 features"):
        soft(9).load_state_dict(state)
    with pytest.raises(UserError, match="still soft in the checkpoint"):
        Permutation(torch.arange(9)).load_state_dict(soft(9).state_dict())


def test_deepcopy_is_independent() -> None:
    permutation = soft(9)
    copied = copy.deepcopy(permutation)
    permutation.harden()
    assert copied.soft and (copied.index == -1).all()


def test_double_model() -> None:
    for projected in FORMS:
        permutation = soft(9, projected=projected).double()
        x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
        assert permutation.matrix().dtype == permutation(x).dtype == torch.float64
        assert torch.autograd.gradcheck(permutation, x)


def test_autocast_rounds_only_the_product() -> None:
    permutation, x = soft(64), torch.randn(4, 64)
    exact = permutation.matrix()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(permutation.matrix(), exact)
        y = permutation(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert permutation.logits is not None and permutation.logits.grad is not None
    assert permutation.logits.grad.dtype == torch.float32
    assert permutation(x.bfloat16()).dtype == torch.bfloat16
