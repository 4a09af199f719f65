import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from padst_exp.dst import Selection, Topology

POOLS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5)


def topology(pools: list[tuple[int, int]]) -> Topology:
    """Pools of 24 candidates, each with (chosen, others) active units."""
    active = [24 * p + 2 * i for p, (k, others) in enumerate(pools) for i in range(k + others)]
    target = torch.tensor([k for k, _ in pools])
    sizes, candidates = torch.full_like(target, 3), torch.full_like(target, 24)
    return Topology(torch.tensor(active), candidates, sizes, 24, (len(pools), 72), target)


def selection(pools: list[tuple[int, int]], logits: Tensor | None = None) -> Selection:
    table = topology(pools)
    drawn = torch.randn(len(table.active), generator=torch.Generator().manual_seed(0))
    return Selection(table, (drawn if logits is None else logits).double())


@given(pools=POOLS, log_temperature=st.floats(-5.0, 3.0), scale=st.floats(0.0, 20.0))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_coefficients_of_a_pool_add_up_to_its_target_at_every_temperature(
    pools: list[tuple[int, int]], log_temperature: float, scale: float
) -> None:
    if not any(k + others for k, others in pools):
        return
    choice = selection(pools)
    choice.logits.data.mul_(scale)  # type: ignore[union-attr]
    choice.temperature.fill_(10**log_temperature)
    soft = choice.coefficients()
    assert bool(((soft >= 0) & (soft <= 1)).all())
    start = 0
    for k, others in pools:
        part = soft[start : start + k + others]
        assert float(part.detach().sum()) == pytest.approx(k, abs=1e-5)
        start += k + others
    (gradient,) = torch.autograd.grad(soft.square().sum(), choice.logits)  # type: ignore[arg-type]
    assert bool(gradient.isfinite().all())
    assert -1e-9 < float(choice.penalty().detach()) < 1 + 1e-6


def test_gradients_follow_the_threshold() -> None:
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    choice = selection([(2, 3), (1, 3)], logits)
    choice.temperature.fill_(0.7)

    def coefficients(logits: Tensor) -> Tensor:
        choice._parameters["logits"] = logits  # type: ignore[assignment]
        return choice.coefficients()

    assert torch.autograd.gradcheck(coefficients, logits, atol=1e-6)


def test_equal_logits_are_uniform_and_a_low_temperature_is_hard() -> None:
    pools = [(2, 3), (1, 3)]
    uniform = selection(pools, torch.zeros(9))
    torch.testing.assert_close(
        uniform.coefficients().detach(), torch.tensor([0.4] * 5 + [0.25] * 4).double()
    )
    assert float(uniform.penalty().detach()) == pytest.approx(1.0)
    assert float(uniform.gain()) < 0.7
    sharp = selection(pools)
    penalties = []
    for temperature in (1.0, 0.3, 0.1, 0.01, 1e-4):
        sharp.temperature.fill_(temperature)
        penalties.append(float(sharp.penalty().detach()))
    assert penalties == sorted(penalties, reverse=True) and penalties[-1] < 1e-6
    assert float(sharp.gain()) == pytest.approx(1.0)
    chosen = sharp.units[sharp.coefficients() > 0.5]
    assert torch.equal(chosen, sharp.nearest())


def test_hardening_keeps_the_largest_of_each_pool_and_remembers_their_coefficients() -> None:
    logits = torch.tensor([0.0, 3, 1, 2, -1, 5, 5, 5, 4])
    choice = selection([(2, 3), (1, 3)], logits)
    nearest, coefficients = choice.nearest(), choice.coefficients().detach()
    assert nearest.tolist() == [2, 6, 24]  # ties to the lower id
    told: list[bool] = []
    choice.on_change.append(lambda: told.append(True))
    choice.harden()
    assert told and not choice.soft and not list(choice.parameters())
    assert torch.equal(choice.nearest(), nearest)
    assert torch.equal(choice.last, coefficients)
    assert float(choice.penalty()) == 0 and float(choice.gain()) == 1


def test_a_choice_from_elsewhere_is_adopted_as_it_is() -> None:
    choice = selection([(2, 3), (1, 3)])
    choice.harden(torch.tensor([0, 4, 30]))
    assert choice.nearest().tolist() == [0, 4, 30]


def test_a_state_holds_logits_temperature_and_units() -> None:
    source = selection([(2, 3), (1, 3)])
    source.temperature.fill_(0.2)
    target = selection([(2, 3), (1, 3)], torch.zeros(9))
    target.units.add_(1)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert torch.equal(source.coefficients(), target.coefficients())
    assert torch.equal(source.nearest(), target.nearest())
