"""SRigL against a re-derivation by hand, row by row, and each defect of its public code."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst.small_training import FEATURES, Training, network, sgd, start
from padst_exp.dst import Signals, SRigL, Topology
from padst_exp.inference.packing import pack
from padst_exp.layers import SparseLinear, SparseWeight, sparse_weights
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import FanIn

SETTINGS: dict[str, Any] = {
    "gamma": 0.3, "ablation": True, "fraction": 0.3, "interval": 5, "stop": 0.75, "moments": "age",
}  # fmt: skip


def srigl(**changes: Any) -> SRigL:
    return SRigL(**SETTINGS | changes)


def decide(
    algorithm: SRigL,
    weights: list[dict[int, float]],
    gradients: list[list[float]],
    fan_in: int,
    *,
    is_output: bool = False,
    step: int = 10,
    carry: float = 0.0,
) -> list[list[int]]:
    """The inputs of each neuron after an update; `weights` are those of its inputs by number."""
    num_rows, num_inputs = len(gradients), len(gradients[0])
    active = [row * num_inputs + i for row, own in enumerate(weights) for i in sorted(own)]
    topology = Topology(
        torch.tensor(active, dtype=torch.int64),
        torch.full((num_rows,), num_inputs),
        torch.ones(num_rows, dtype=torch.int64),
        num_inputs,
        num_rows * num_inputs,
        torch.full((num_rows,), fan_in),
        is_output,
    )
    signals = Signals(
        magnitude=torch.tensor([own[i] for own in weights for i in sorted(own)]),
        generator=torch.Generator(),
        progress=step / 100,
        dense_gradient=torch.tensor(gradients),
    )
    change, _ = algorithm.decide(topology, signals, step=step, total=100, carry=carry)
    units = change.active.tolist()
    return [[u % num_inputs for u in units if u // num_inputs == r] for r in range(num_rows)]


def by_hand(
    algorithm: SRigL,
    weights: list[dict[int, float]],
    gradients: list[list[float]],
    fan_in: int,
    is_output: bool,
    step: int,
    carry: float,
) -> list[list[int]]:
    """srigl.md, section 1, one neuron after the other."""
    num_rows, num_inputs = len(gradients), len(gradients[0])
    present = [(-w, r, i) for r, own in enumerate(weights) for i, w in own.items()]
    steep = [(-g, r, i) for r, row in enumerate(gradients) for i, g in enumerate(row)]
    share = algorithm.fraction / 2 * (1 + math.cos(math.pi * step / (algorithm.stop * 100)))
    n_prune = math.floor(share * len(present) + carry)
    n_keep = min(len(present) - n_prune, sum(minus_w < 0 for minus_w, _, _ in present))
    heavy = [(r, i) for _, r, i in sorted(present)[:n_keep]]
    salient = {*heavy, *((r, i) for _, r, i in sorted(steep)[:n_prune])}
    per_row = [sum(row == r for row, _ in salient) for r in range(num_rows)]

    threshold = max(1, int(algorithm.gamma * fan_in + 1e-9))
    budget = fan_in * num_rows
    enough = math.ceil(budget / num_inputs)  # with fewer neurons some would pass the dense width
    threshold = min(threshold, sorted(per_row, reverse=True)[enough - 1])
    alive = [n >= threshold or is_output or not algorithm.ablation for n in per_row]
    wide = budget // sum(alive)

    now_heavy = sorted((m, r, i) for m, r, i in present if alive[r])[:n_keep]
    after = []
    for row in range(num_rows):
        if not alive[row]:
            after.append([])
            continue
        kept = [i for _, r, i in now_heavy if r == row][:wide]
        free = sorted((-g, i) for i, g in enumerate(gradients[row]) if i not in kept)
        after.append(sorted(kept + [i for _, i in free[: wide - len(kept)]]))
    return after


def test_equals_a_derivation_row_by_row() -> None:
    chance = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=chance))

    ablated = revived = tied = 0
    for case in range(400):
        rows, inputs = number(2, 8), number(4, 12)
        fan_in = number(1, inputs + 1)
        # Few distinct numbers make ties, zero weights are those just grown.
        levels = 1000 if case % 2 else 4
        gradients = torch.randint(0, levels, (rows, inputs), generator=chance).double().tolist()
        weights: list[dict[int, float]] = []
        for _ in range(rows):
            width = 0 if number(0, 4) == 0 else min(inputs, fan_in + number(0, 3))
            chosen = torch.randperm(inputs, generator=chance)[:width].tolist()
            heaviest = levels if number(0, 3) else 2
            weights.append({i: float(number(0, heaviest)) for i in chosen})
        if not any(weights):
            continue
        algorithm = srigl(
            gamma=number(0, 11) / 10, ablation=number(0, 5) > 0, fraction=number(0, 11) / 10
        )
        given = {"is_output": number(0, 5) == 0, "step": number(0, 75), "carry": number(0, 9) / 10}
        found = decide(algorithm, weights, gradients, fan_in, **given)  # type: ignore[arg-type]
        assert found == by_hand(algorithm, weights, gradients, fan_in, **given), case  # type: ignore[arg-type]
        ablated += any(own and not now for own, now in zip(weights, found, strict=True))
        revived += any(now and not own for own, now in zip(weights, found, strict=True))
        tied += levels == 4
        widths = {len(now) for now in found if now}
        assert len(widths) == 1 and max(widths) <= inputs
        if given["is_output"] or not algorithm.ablation:
            assert all(found)
    assert ablated > 30 and revived > 15 and tied > 150


def test_gamma_is_not_ignored() -> None:
    # What was just grown is still zero, and not salient.
    weights = [{0: 9.0, 1: 8.0, 2: 7.0, 3: 6.0}, {0: 5.0, 1: 0.0, 2: 0.0, 3: 0.0}] * 2
    gradients = [[0.0] * 8 for _ in weights]
    lenient, strict = (
        decide(srigl(gamma=gamma, fraction=0.0), weights, gradients, 4) for gamma in (0.25, 1.0)
    )
    assert [len(row) for row in lenient] == [4, 4, 4, 4]
    assert [len(row) for row in strict] == [8, 0, 8, 0]


def test_freed_budget_goes_to_the_survivors() -> None:
    # Public rewrites leave 20 inputs to a row where the budget gives it 40.
    weights = [{i: 10.0 + i for i in range(20)}] * 4 + [dict.fromkeys(range(20), 0.0)] * 4
    gradients = [[0.0] * 100 for _ in weights]
    found = decide(srigl(gamma=1.0, fraction=0.0), weights, gradients, 20)
    assert [len(row) for row in found] == [40] * 4 + [0] * 4


def test_rows_are_cut_by_magnitude() -> None:
    # Sorting a mask instead keeps the three smallest of 1 .. 8.
    weights = [{i: i + 1.0 for i in range(8)}, {0: 1.0}]
    gradients = [[0.0] * 10 for _ in weights]
    found = decide(srigl(ablation=False, fraction=0.0), weights, gradients, 3)
    assert found[0] == [5, 6, 7]


def test_fan_in_never_passes_the_dense_width() -> None:
    # The one salient row would have to read 12 of 6 inputs; the next best must stay too.
    weights = [dict.fromkeys(range(6), 9.0), {0: 0.0, 1: 0.0, 2: 0.0}, {3: 0.1, 4: 0.0, 5: 0.0}]
    found = decide(srigl(gamma=1.0, fraction=0.0), weights, [[1.0] * 6] * 3, 4)
    assert [len(row) for row in found] == [6, 0, 6]


def test_ablation_can_be_switched_off() -> None:
    weights = [{0: 9.0, 1: 9.0}, {0: 0.0, 1: 0.0}]
    gradients = [[1.0] * 4, [0.0] * 4]
    assert [len(r) for r in decide(srigl(gamma=1.0), weights, gradients, 2)] == [4, 0]
    assert [len(r) for r in decide(srigl(ablation=False), weights, gradients, 2)] == [2, 2]


def bottleneck() -> nn.Sequential:
    """Half of the hidden neurons do next to nothing at first, so that they are ablated."""
    model = network()
    with torch.no_grad():
        model[0].weight[::2] *= 0.01
        model[2].weight[:, ::2] *= 0.01
        model[0].bias.fill_(0.5)
    return model


def ablating(**changes: Any) -> Training:
    return start(srigl(gamma=0.8), FanIn(group=1), steps=40, model=bottleneck(), **changes)


def first_layer(model: nn.Module) -> tuple[SparseLinear, SparseWeight, Tensor]:
    """A layer, its weight, and which of its outputs are silent."""
    layer = model[0]
    weight = layer.parts()[0]
    silent = layer.folding().live_rows().logical_not()
    return layer, weight, silent


def test_silent_neurons_are_silent_everywhere() -> None:
    for learner in (None, RandomPermutation(side="out")):
        check_silence(ablating(learner=learner).run(20))


def check_silence(training: Training) -> None:
    layer, _, silent = first_layer(training.model)
    assert 0 < int(silent.sum()) < len(silent)
    x = torch.randn(5, FEATURES)
    for mode in (True, False):
        training.model.train(mode)
        y = layer(x)
        assert bool((y[:, silent] == 0).all()) and bool((y[:, ~silent] != 0).all())
    # Only the live ones learn a bias.
    bias = dict(layer.named_parameters())["bias"]
    bias.grad = None
    layer(x).square().sum().backward()
    assert bias.grad is not None and bool((bias.grad[silent] == 0).all())
    expected = training.model.eval()(x)
    pack(training.model)
    torch.testing.assert_close(training.model(x), expected, atol=1e-5, rtol=1e-5)
    bare = training.model[0](torch.zeros(1, FEATURES))[0]
    assert bool((bare[silent] == 0).all()) and bool((bare[~silent] != 0).any())


def test_an_output_that_something_else_feeds_keeps_its_bias() -> None:
    layer, _, silent = first_layer(ablating(low_rank=1, density=0.4).run(20).model)
    assert bool(silent.any()) and layer.live is None


def test_moments_follow_and_inactive_entries_have_none() -> None:
    for optimizer, storage in product(("adamw", "sgd"), ("packed", "masked")):
        check_moments(optimizer, storage)


def check_moments(optimizer: str, storage: Any) -> None:
    training = start(
        srigl(gamma=0.8, fraction=0.5), FanIn(group=1), steps=40, model=bottleneck(),
        optimizer=sgd() if optimizer == "sgd" else None, storage=storage,
    )  # fmt: skip
    ever_silent: set[int] = set()
    revived = 0

    def check(now: Training) -> None:
        nonlocal revived
        _, weight, silent = first_layer(now.model)
        rows = set(silent.nonzero().flatten().tolist())
        revived += len(ever_silent - rows)
        ever_silent.update(rows)
        if now.state.step == 5:
            # What comes next suddenly listens to them.
            later = sparse_weights(now.model)["2.weights.0"]
            columns = torch.arange(48) if storage == "masked" else later.entries() % 48
            with torch.no_grad():
                later.values.mul_(torch.where(columns % 2 == 0, 1000.0, 0.1))
        counts = weight.topology().counts()
        assert len(counts[counts > 0].unique()) == 1
        assert int(counts.sum()) <= int(weight.target.sum())
        state = now.state.optimizer.state[weight.values]
        keys = [key for key in state if key in ("exp_avg", "exp_avg_sq", "momentum_buffer")]
        assert len(keys) == (1 if optimizer == "sgd" else 2)
        for key in keys:
            assert state[key].shape == weight.values.shape
            if storage == "masked":
                mask = torch.zeros(weight.shape, dtype=torch.bool).flatten()
                mask[weight.entries().flatten()] = True
                assert bool((state[key].flatten()[~mask] == 0).all())

    training.run(30, check)
    assert ever_silent and revived, "nothing was ablated, or nothing returned"


def test_grown_entries_start_at_zero_in_value_and_moments() -> None:
    training = start(srigl(fraction=0.5), FanIn(group=1), steps=40)
    before: dict[int, float] = {}
    grown = 0

    def check(now: Training) -> None:
        nonlocal grown
        weight = next(iter(sparse_weights(now.model).values()))
        state = now.state.optimizer.state[weight.values]
        for place, unit in enumerate(weight.active.tolist()):
            if before and unit not in before and now.state.step % 5 == 0:
                grown += 1
                assert float(weight.values[place].detach()) == 0
                assert float(state["exp_avg"][place]) == float(state["exp_avg_sq"][place]) == 0
        before.clear()
        before.update(dict.fromkeys(weight.active.tolist(), 0.0))

    training.run(12, check)
    assert grown


def test_groups_are_counted_and_ablated_as_one() -> None:
    training = start(srigl(gamma=0.9, fraction=0.5), FanIn(group=8), steps=40, model=bottleneck())
    with torch.no_grad():
        # Rows 8 .. 15 are as good as nothing.
        weight = sparse_weights(training.model)["0.weights.0"]
        weight.values[weight.active // FEATURES == 1] *= 1e-3
    training.run(5)
    _, weight, silent = first_layer(training.model)
    by_group = silent.view(-1, 8)
    assert bool((by_group.all(1) == by_group.any(1)).all()) and bool(by_group.all(1).any())
    counts = weight.topology().counts()
    assert counts[counts > 0].unique().tolist() == [
        int(weight.target.sum()) // int((counts > 0).sum())
    ]


def test_the_classifier_is_never_ablated() -> None:
    training = start(
        srigl(gamma=1.0, fraction=0.5), FanIn(group=1), steps=40, model=bottleneck(),
        rules=[Rule("0"), Rule("2"), Rule("4")],
    )  # fmt: skip
    weights = sparse_weights(training.model)
    assert [weight.is_output for weight in weights.values()] == [False, False, True]
    # Without the exemption its upper half would go at once.
    with torch.no_grad():
        weights["4.weights.0"].values[: len(weights["4.weights.0"].values) // 2] *= 1e-4
    training.run(20)
    assert bool((weights["0.weights.0"].topology().counts() == 0).any())
    assert bool((weights["4.weights.0"].topology().counts() > 0).all())


def test_each_row_starts_from_its_own_fan_in() -> None:
    # The public default passes the variance as the standard deviation: 0.337 for 0.577 at 6 inputs.
    model = nn.Sequential(nn.Linear(600, 400), nn.GELU(), nn.Linear(400, 4))
    dense = float(model[0].weight.detach().std())
    sparsify(model, [Rule("0")], structure=FanIn(group=1), density=0.01, algorithm=srigl())
    weight = model[0].parts()[0]
    assert weight.topology().counts().unique().tolist() == [6]
    assert float(weight.values.detach().std()) == pytest.approx(
        dense * math.sqrt(600 / 6), rel=0.05
    )
