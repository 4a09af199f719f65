"""Swaps of features at updates of the topology, against brute force."""

import pytest
import torch
from torch import Tensor

from dst.small_training import start
from from_yaml import from_yaml
from padst_exp.errors import UserError
from padst_exp.layers import permutations, sparse_weights
from padst_exp.permutations import Evidence, Moves, Permutation
from padst_exp.permutations.moves import _swaps, even_unit, noise, swap_gains


def random_evidence(seed: int, *, side: str = "in", budget: float = 12.0) -> Evidence:
    torch.manual_seed(seed)
    active = torch.rand(14, 7) < 0.4
    true = torch.randn(14, 7, dtype=torch.float64)
    return Evidence(
        side=side, active=active, values=torch.randn(14, 7).double() * active,  # type: ignore[arg-type]
        gradients=true + 0.3 * torch.randn(4, 14, 7).double(), budget=budget,
    )  # fmt: skip


def value_of(active: Tensor, worth: Tensor, grown: Tensor, feature_in: list[int]) -> float:
    """What all slots are worth with the feature of slot feature_in[i] in slot i, entry by entry."""
    total = 0.0
    for row in range(len(active)):
        for slot, feature in enumerate(feature_in):
            if active[row, slot]:
                has = bool(active[row, feature])
                total += float(worth[row, feature] if has else grown[row, feature])
    return total


def test_gains_and_errors_are_those_of_every_swap_one_by_one() -> None:
    known = random_evidence(0)
    active = known.active.double()
    worth, grown, variance = (torch.rand(14, 7, dtype=torch.float64) for _ in range(3))
    gains, errors = swap_gains(active, worth, grown, variance)
    assert errors is not None
    stay = list(range(7))
    for one in range(7):
        for other in range(7):
            if one == other:
                continue
            swapped = list(stay)
            swapped[one], swapped[other] = other, one
            expected = value_of(known.active, worth, grown, swapped)
            expected -= value_of(known.active, worth, grown, stay)
            assert float(gains[one, other]) == pytest.approx(expected, abs=1e-12)
            new = known.active[:, one] ^ known.active[:, other]
            brought = torch.where(known.active[:, one], variance[:, other], variance[:, one])
            spread = float(brought[new].sum())
            assert float(errors[one, other]) == pytest.approx(spread**0.5)


def test_the_unit_makes_the_drops_of_the_algorithm_an_even_exchange() -> None:
    known = random_evidence(1, budget=5)
    unit = even_unit(known)
    assert unit is not None
    weights = known.values[known.active].abs().sort().values
    squares = (known.gradients[0] * known.gradients[1])[~known.active].sort(descending=True).values
    assert unit * weights[4] ** 2 == pytest.approx(float(squares[4]) / unit)
    assert even_unit(random_evidence(1, budget=0.5)) is None


def test_the_product_of_two_estimates_has_the_variance_that_is_said() -> None:
    torch.manual_seed(0)
    gradient, sigma = 0.7, 0.4
    one, other = gradient + sigma * torch.randn(2, 3, 200_000, dtype=torch.float64)
    said = noise(one, other).mean(1)
    torch.testing.assert_close((one * other).var(1), said, rtol=0.1, atol=0)


def test_swaps_are_disjoint_allowed_gaining_and_within_the_budget() -> None:
    torch.manual_seed(0)
    for budget in (0.0, 3.0, 10.0, 1e9):
        gains = torch.randn(12, 12)
        gains, cost = gains + gains.T, torch.randint(1, 5, (12, 12)).float()
        allowed = torch.rand(12, 12) < 0.7
        slots = _swaps(gains, allowed, cost + cost.T, budget)
        if slots is None:
            assert budget < 4
            continue
        assert torch.equal(slots[slots], torch.arange(12))
        pairs = [(i, int(j)) for i, j in enumerate(slots) if i < j]
        assert all(gains[pair] > 0 and allowed[pair] for pair in pairs)
        assert float(sum((cost + cost.T)[pair] for pair in pairs)) <= budget
        best = divmod(int(gains.triu(1).argmax()), 12)
        if budget > 1e6:  # the best one of all, if it passed its test
            assert (best in pairs) == bool(allowed[best])


def test_a_move_is_told_as_a_permutation_on_either_side() -> None:
    learner = from_yaml("permutation/moves", significance=0.0)
    for seed in range(4):
        torch.manual_seed(seed)
        permutation = Permutation(torch.randperm(7))
        held = permutation.index
        inner = learner.exchange(permutation, random_evidence(seed, budget=100.0))
        outer = learner.exchange(permutation, random_evidence(seed, side="out", budget=100.0))
        if inner is None:
            assert outer is None
            continue
        assert inner.carry and outer.carry
        # The same slots change their contents: slot i holds index[i], or feature f is at index[f].
        swapped_in = held.argsort()[inner.index]
        swapped_out = outer.index[held.argsort()]
        assert torch.equal(swapped_in, swapped_out)


def test_noise_moves_nothing_and_signal_does() -> None:
    learner = from_yaml("permutation/moves")
    taken = {"noise": 0, "signal": 0}
    for seed in range(20):
        torch.manual_seed(seed)
        active = torch.zeros(64, 16, dtype=torch.bool)
        active[:32, :8] = active[32:, 8:] = True
        values = torch.randn(64, 16) * active
        for name in taken:
            gradients = torch.randn(4, 64, 16)
            if name == "signal":
                values[:, [0, 8]] *= 0.01  # slots whose features belong to the other half
                gradients[:, 32:, 0] += 3
                gradients[:, :32, 8] += 3
            known = Evidence(
                side="in", active=active, values=values, gradients=gradients, budget=100.0
            )
            proposal = learner.exchange(Permutation(torch.arange(16)), known)
            taken[name] += proposal is not None
            if name == "signal" and proposal is not None:
                assert proposal.index[0] == 8 and proposal.index[8] == 0
    assert taken["signal"] == 20 and taken["noise"] <= 2


def test_lost_entries_are_paid_by_the_next_drops() -> None:
    algorithm = from_yaml("dst/rigl", interval=3, fraction=0.5)
    learner = from_yaml("permutation/moves", every=1, significance=0.0, deadline=1.0)
    run = start(
        algorithm, from_yaml("structure/block", size=4), steps=24, learner=learner, density=0.3
    )
    carries: list[float] = []
    run.run(
        24, after=lambda t: carries.extend(float(w.carry) for w in sparse_weights(t.model).values())
    )
    rows = [row for row in run.rows if row["kind"] == "exchange"]
    assert sum(row["moved"] for row in rows) > 0 and sum(row["lost"] for row in rows) > 0
    assert min(carries) < 0
    # Entries lost and units dropped together stay within what the algorithm drops by itself.
    units = sum(len(weight.active) for weight in sparse_weights(run.model).values())
    budget = sum(algorithm.drop_fraction(step, 24) for step in range(3, 18, 3)) * units * 16
    dropped = sum(row["replaced"] for row in run.rows if row["kind"] == "rewire") * 16
    assert sum(row["lost"] for row in rows) <= budget and dropped <= budget
    assert all(not p.soft for p in permutations(run.model).values())


def test_it_moves_at_every_so_many_th_update_until_the_deadline() -> None:
    learner = from_yaml("permutation/moves", every=2, deadline=0.5)
    assert isinstance(learner, Moves)
    permutation = Permutation(torch.arange(3))
    learner.start({"p": permutation})
    due = [bool(learner.exchanges(s, 20, rewiring=s % 2 == 0)) for s in range(1, 21)]
    assert [step for step, is_due in enumerate(due, 1) if is_due] == [4, 8]
    again = from_yaml("permutation/moves", every=2, deadline=0.5)
    again.start({"p": permutation})
    again.exchanges(2, 20, rewiring=True)
    third = from_yaml("permutation/moves", every=2, deadline=0.5)
    third.start({"p": permutation})
    third.load_state_dict(again.state_dict())
    assert third.exchanges(4, 20, rewiring=True)


def test_what_never_drops_is_refused_and_bad_settings_are_named() -> None:
    for dst in ("static", "dynadiag", "sr_ste"):
        with pytest.raises(UserError, match=r"^dst: expected one that drops and grows, such as "):
            start(
                from_yaml(f"dst/{dst}"), from_yaml("structure/block", size=4), steps=4,
                learner=from_yaml("permutation/moves"),
            )  # fmt: skip
    for key, value in {"every": 0, "significance": -1.0, "deadline": 0.0}.items():
        with pytest.raises(UserError, match=rf"^permutation\.{key}: expected .*, got {value}$"):
            from_yaml("permutation/moves", **{key: value})
