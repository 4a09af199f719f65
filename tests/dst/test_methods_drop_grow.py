"""What leaves and what comes, recomputed in plain Python from the formula of each method."""

import math
from itertools import product
from typing import Any

import pytest
import torch

from dst.small_training import Training, start
from from_yaml import from_yaml
from padst_exp.dst import DropGrow, Signals, Topology
from padst_exp.structures import NM, Block, Diagonal, FanIn, Structure, Unstructured

Units = dict[int, float]


def cosine(share: float) -> float:
    return (1 + math.cos(math.pi * min(share, 1))) / 2


def by_hand(
    pools: list[list[int]],
    active: list[int],
    score: Units,
    grow: Units,
    *,
    kept: list[int],
    filled: list[int],
    fraction: float,
    carry: float,
) -> tuple[list[int], float]:
    """Prune each pool to `kept`, drop a share of all that is left, fill pools up to `filled`."""
    left = []
    for pool, number in zip(pools, kept, strict=True):
        own = sorted((unit for unit in active if unit in pool), key=lambda u: (-score[u], u))
        left += own[:number]
    wanted = fraction * len(left) + carry
    left.sort(key=lambda unit: (score[unit], unit))
    left = left[math.floor(wanted) :]
    after = []
    for pool, number in zip(pools, filled, strict=True):
        own = [unit for unit in left if unit in pool]
        free = sorted((u for u in pool if u not in own), key=lambda u: (-grow[u], u))
        after += own + free[: number - len(own)]
    return sorted(after), wanted - math.floor(wanted)


class Case:
    """One weight with random pools, topology, target and signals; half of them full of ties."""

    def __init__(self, seed: int, start: float, methods: str) -> None:
        chance = torch.Generator().manual_seed(seed)
        integer = lambda low, high: int(torch.randint(low, high, (), generator=chance))  # noqa: E731
        levels = 3 if seed % 2 else 1000
        sizes = [integer(3, 20) for _ in range(integer(1, 5))]
        self.width = max(sizes)
        self.pools = [[p * self.width + i for i in range(n)] for p, n in enumerate(sizes)]
        self.target = [integer(1, n) for n in sizes]
        begun = [max(round(n * start), t) for n, t in zip(sizes, self.target, strict=True)]
        if methods == "shrinking":
            self.counts = [integer(t, b + 1) for t, b in zip(self.target, begun, strict=True)]
        elif methods == "elastic":
            self.counts = [integer(t, n + 1) for t, n in zip(self.target, sizes, strict=True)]
        else:
            self.counts = self.target
        self.begun = begun
        self.active = []
        for pool, count in zip(self.pools, self.counts, strict=True):
            order = torch.randperm(len(pool), generator=chance)[:count]
            self.active += sorted(pool[int(i)] for i in order)
        number = len(self.active)
        self.magnitude = torch.randint(0, levels, (number,), generator=chance).double()
        self.own_gradient = torch.randint(0, levels, (number,), generator=chance).double()
        shape = len(sizes), self.width
        self.gradient = torch.randint(0, levels, shape, generator=chance).double()
        self.topology = Topology(
            torch.tensor(self.active),
            torch.tensor(sizes),
            torch.ones(len(sizes), dtype=torch.int64),
            self.width,
            sum(sizes),
            torch.tensor(self.target),
        )
        self.step, self.carry, self.seed = integer(1, 100), integer(0, 10) / 10, seed

    def signals(self) -> Signals:
        return Signals(
            magnitude=self.magnitude,
            generator=torch.Generator().manual_seed(self.seed),
            progress=self.step / 100,
            dense_gradient=self.gradient,
            weight_gradient=self.own_gradient,
        )

    def random(self) -> Units:
        generator = torch.Generator().manual_seed(self.seed)
        return dict(
            enumerate(torch.rand(self.gradient.shape, generator=generator).flatten().tolist())
        )

    def steepest(self) -> Units:
        return dict(enumerate(self.gradient.flatten().tolist()))

    def scores(self, gradient: float = 0.0) -> Units:
        both = self.magnitude + gradient * self.own_gradient
        return dict(zip(self.active, both.tolist(), strict=True))


def cubic(case: Case, end: float) -> list[int]:
    """GMP, equation 1, in units: target + (first - target) (1 - t / end)^3."""
    left = (1 - min(case.step / 100 / end, 1)) ** 3
    both = zip(case.target, case.begun, case.counts, strict=True)
    return [min(target + round((first - target) * left), now) for target, first, now in both]


def elastic(case: Case) -> list[int]:
    """The target and a share of it beyond, of whole units over all pools together."""
    share, done, counts = 0.5 * cosine(case.step / 75), 0, []
    for place, (target, pool) in enumerate(zip(case.target, case.pools, strict=True)):
        upto = math.floor(sum(case.target[: place + 1]) * share)
        counts.append(min(target + upto - done, len(pool)))
        done = upto
    return counts


def expected(name: str, case: Case) -> tuple[list[int], float]:
    share = cosine(case.step / 75)
    fixed = {"kept": case.counts, "filled": case.counts, "carry": case.carry}
    how: dict[str, tuple[Units, Units, dict[str, Any]]] = {
        "set": (case.scores(), case.random(), {**fixed, "fraction": 0.3 * share}),
        "diag_heur": (case.scores(), case.random(), {**fixed, "fraction": 0.3 * share}),
        "rigl": (case.scores(), case.steepest(), {**fixed, "fraction": 0.3 * share}),
        "mest": (case.scores(0.01), case.random(), {**fixed, "fraction": 0.3 * share}),
    }
    if name in how:
        score, grow, rest = how[name]
    elif name == "mest_ems":
        score, grow = case.scores(0.01), case.random()
        rest = {**fixed, "kept": case.target, "filled": elastic(case), "fraction": 0.0}
    else:
        counts = cubic(case, 0.75 if name == "gmp" else 0.6)
        score = case.scores()
        grow = case.random() if name == "gmp" else case.steepest()
        fraction = 0.0 if name == "gmp" else 0.5 * share
        rest = {**fixed, "kept": counts, "filled": counts, "fraction": fraction}
    return by_hand(case.pools, case.active, score, grow, **rest)


def test_each_method_drops_and_grows_what_its_formula_says() -> None:
    for name in ("set", "diag_heur", "rigl", "mest", "mest_ems", "gmp", "granet"):
        check_formula(name)


def check_formula(name: str) -> None:
    algorithm = from_yaml(f"dst/{name}")
    family = {"gmp": "shrinking", "granet": "shrinking", "mest_ems": "elastic"}.get(name, "")
    changed = 0
    for seed in range(200):
        case = Case(seed, 0.5 if name == "granet" else 1.0, family)
        change, carry = algorithm.decide(
            case.topology, case.signals(), step=case.step, total=100, carry=case.carry
        )
        units, left = expected(name, case)
        assert change.active.tolist() == units, seed
        assert carry == pytest.approx(left)
        changed += units != case.active
    assert changed > 80


STRUCTURES = [
    Unstructured(),
    FanIn(group=8),
    NM(n=1, m=None, group=16),
    Block(size=4, balanced=False),
    Diagonal(bundle=1, stride=16, width=16),
]


def test_what_shrinks_or_swells_ends_at_its_target() -> None:
    for name, structure in product(("mest_ems", "gmp", "granet"), STRUCTURES):
        check_densities(name, structure)


def check_densities(name: str, structure: Structure) -> None:
    algorithm = from_yaml(f"dst/{name}", interval=4)
    training = start(algorithm, structure, steps=30, ema_decay=0.9)
    densities: list[float] = []

    def check(now: Training) -> None:
        densities.append(now.report.density("layers"))
        for weight in now.model[0].parts():
            state = now.state.optimizer.state[weight.values]
            assert state["exp_avg"].shape == weight.values.shape
            owners = [p for g in now.state.optimizer.param_groups for p in g["params"]]
            assert sum(p is weight.values for p in owners) == 1

    training.run(30, check)
    for layer in training.report.model_layers.values():
        for weight in layer.parts():
            assert torch.equal(weight.topology().counts(), weight.target)
    final = densities[-1]
    # The last update is at ceil(0.75 * 30).
    assert densities[22:] == [final] * 8 and max(densities) > final
    if name == "mest_ems":
        assert densities[0] == final and max(densities) <= 1.5 * final + 1e-9
        grown = densities[3:20]
        assert grown == sorted(grown, reverse=True)
    else:
        assert densities == sorted(densities, reverse=True)
        assert densities[0] == pytest.approx(1.0 if name == "gmp" else 0.5, abs=0.15)


def test_an_algorithm_asks_for_what_its_scores_need() -> None:
    def needs(name: str) -> frozenset[str]:
        algorithm = from_yaml(f"dst/{name}")
        assert isinstance(algorithm, DropGrow)
        return algorithm.needs

    assert needs("set") == needs("gmp") == frozenset()
    assert needs("rigl") == needs("granet") == {"dense_gradient"}
    assert needs("mest") == needs("mest_ems") == {"weight_gradient"}
