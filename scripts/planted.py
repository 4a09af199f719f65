"""Every permutation learner against a fixed random permutation, and what each costs.

planted.csv in results/tables: planted regression (`padst_exp.analysis.planted`), five seeds; errors
are shares of the teacher's weight. learners.csv: parameters, memory and time of one layer at 768
and 3072 features. Rows that are there already are not measured again: delete a table, or rows of
it, to do so. About ten minutes on one core.
"""

import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from runs import compose, measured_where
from torch import nn

from padst_exp.analysis.planted import learn_planted, mean_error
from padst_exp.bench import tables
from padst_exp.config import build, options
from padst_exp.layers import evidence, permutations, places, sparse_layers
from padst_exp.permutations import Permutation, PermutationLearner, Site
from padst_exp.soft import choices, soft_choices
from padst_exp.sparsify import Rule, sparsify

TABLES = Path(__file__).parents[1] / "results" / "tables"
SEEDS = range(5)
STRUCTURES = {
    "block": ["structure=block", "structure.size=8"],
    "diag": ["structure=diag", "structure.bundle=1"],
}
# What suits trainings of 400 steps; all else is as conf/permutation has it.
QUICK = {
    "interval": {"straight_through": 20, "givens": 20},
    "every": {"moves": 1},
    "deadline": {"straight_through": 0.5, "givens": 0.6, "moves": 0.75},
}
OFFLINE = ("greedy", "search")  # they know nothing of fresh weights
FEATURES, TOKENS, DENSITY = (768, 3072), 512, 0.1


def main() -> None:
    """Fill both tables."""
    torch.set_num_threads(1)
    fill("planted", planted())
    fill("learners", costs())


def fill(name: str, parts: Iterator[tuple[str, Callable[[], dict[str, Any]]]]) -> None:
    """Add the rows that a table lacks, one by one; each has a key of its own."""
    path = TABLES / f"{name}.csv"
    rows: list[dict[str, Any]] = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    for key, measure in parts:
        if all(row["key"] != key for row in rows):
            # Rows may come from several commits.
            rows.append({"key": key, **measure(), **measured_where()})
            print(*rows[-1].values())
            tables.write(path, rows)


def planted() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Learners in training from fresh weights, offline ones from trained weights."""
    random: dict[str, list[float]] = {}
    names = ["random", *(n for n in options("permutation") if n not in ("none", "random"))]
    for structure in STRUCTURES:
        for name in [*names, "doubly_stochastic permutation.init=width permutation.scale=0.25"]:
            for start in ("trained",) if name in OFFLINE else ("fresh",):
                key = f"{structure} {start} {name}"
                yield key, lambda k=key, s=structure, n=name, t=start: against(k, s, n, t, random)


def against(
    key: str, structure: str, name: str, start: str, random: dict[str, list[float]]
) -> dict[str, Any]:
    """One row: five students of a learner beside five of the random permutation."""
    began = time.perf_counter()
    found = errors(structure, name, start)
    seconds = (time.perf_counter() - began) / len(SEEDS)
    kind = f"{structure} {start}"
    if kind not in random:
        random[kind] = found if name == "random" else errors(structure, "random", start)
    mean, base = (sum(values) / len(values) for values in (found, random[kind]))
    wins = sum(one < other for one, other in zip(found, random[kind], strict=True))
    return {
        "structure": structure,
        "permutation": name,
        "start": start,
        "error": f"{mean:.4f}",
        "random": f"{base:.4f}",
        "ratio": f"{mean / base:.3f}",
        "wins": f"{wins} of {len(SEEDS)}",
        "errors": " ".join(f"{value:.3f}" for value in found),
        "seconds_per_student": f"{seconds:.1f}",
    }


def errors(structure: str, name: str, start: str) -> list[float]:
    """The error of a student of each seed."""
    option, *keys = name.split()
    cfg = compose(
        *STRUCTURES[structure], f"permutation={option}", *keys, "dst=rigl", "dst.interval=10",
        "optimizer.lr=0.1", "optimizer.weight_decay=0", "trainer.steps=400",
        "trainer.batch_size=256", "trainer.epochs=null",
    )  # fmt: skip
    tuned(cfg.permutation, option)
    return [
        mean_error(
            [
                learn_planted(
                    build(cfg.structure, "structure"), build(cfg.permutation, "permutation"),
                    algorithm=build(cfg.dst, "dst"), optimizer=build(cfg.optimizer, "optimizer"),
                    trainer=build(cfg.trainer, "trainer"), seed=seed,
                    noise=0.5 if start == "trained" else None,
                )
            ]
        )
        for seed in SEEDS
    ]  # fmt: skip


def tuned(permutation: DictConfig, option: str) -> None:
    """Set what suits a short training on the input side."""
    for key, values in QUICK.items():
        if option in values:
            permutation[key] = values[option]
    if "interval" in permutation and option not in QUICK["interval"]:
        permutation.interval = 10
    if "side" in permutation:
        permutation.side = "in"


def costs() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every learner on one square layer of blocks, forward, backward and its own step."""
    names = ["random", *(name for name in options("permutation") if name not in ("none", "random"))]
    for features in FEATURES:
        for name in names:
            yield f"{features} {name}", lambda f=features, n=name: cost(f, n)


def cost(features: int, name: str) -> dict[str, Any]:
    """One row: while the permutation is learned, in turns with a layer of a random one."""
    learner, model = layer_of(features, name)
    pairs = [layer_of(features, "random"), (learner, model)]
    times: list[list[float]] = [[], []]
    for step in range(8 if features < 1000 else 3):
        for spent, (one, network) in zip(times, pairs, strict=True):
            spent.append(step_time(features, one, network, 0.1 + 0.01 * step))
    # The first ones make caches and pages.
    base, seconds = (min(spent[1:]) for spent in times)
    soft = [c for c in soft_choices(model).values() if c.logits is not None]
    parameters = sum(c.logits.numel() for c in soft if c.logits is not None)
    state = learner.state_dict()["optimizer"]
    moments = 0 if state is None else sum(
        value.numel() * value.element_size()
        for part in state["state"].values() for value in part.values()
    )  # fmt: skip
    buffers = sum(
        tensor.numel() * tensor.element_size()
        for choice in choices(model).values() for tensor in choice.buffers(recurse=False)
    )  # fmt: skip
    what, event = rare(features, learner, model)
    return {
        "features": features,
        "permutation": name,
        "parameters": parameters,
        "megabytes": f"{(8 * parameters + moments + buffers) / 2**20:.2f}",
        "step_ms": f"{1000 * seconds:.1f}",
        "over_random": f"{seconds / base:.2f}",
        "rare": what,
        "rare_seconds": f"{event:.2f}",
        "tokens": TOKENS,
    }


def layer_of(features: int, name: str) -> tuple[PermutationLearner, nn.Module]:
    """A learner and its layer of `features` inputs and outputs."""
    cfg = compose("structure=block", "structure.size=16", f"permutation={name}", "dst=rigl")
    if "side" in cfg.permutation:
        cfg.permutation.side = "in"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, features, bias=False))
    learner: PermutationLearner = build(cfg.permutation, "permutation")
    sparsify(
        model, [Rule("0")], structure=build(cfg.structure, "structure"), density=DENSITY,
        learner=learner, algorithm=build(cfg.dst, "dst"),
    )  # fmt: skip
    learner.start({n: c for n, c in choices(model).items() if isinstance(c, Permutation)})
    return learner, model


def step_time(
    features: int, learner: PermutationLearner, model: nn.Module, progress: float
) -> float:
    """Seconds of a forward and a backward pass and a step of the learner."""
    x = torch.randn(TOKENS, features, requires_grad=True)
    began = time.perf_counter()
    learner.zero_grad()
    model.zero_grad()
    model(x).square().mean().backward()
    learner.step(progress)  # where a penalty counts already
    return time.perf_counter() - began


def rare(features: int, learner: PermutationLearner, model: nn.Module) -> tuple[str, float]:
    """What a learner does now and then, or once, and how long it takes."""
    ((_, layer),) = sparse_layers(model).items()
    (permutation,) = permutations(model).values()
    began = time.perf_counter()
    if learner.exchanges(0, 100, rewiring=True) or learner.parts:
        known = None
        if learner.parts:
            (weight,) = layer.parts()
            weight.part_gradients = torch.randn(learner.parts, features, features)
            known = evidence(list(places(model, permutation)), 0.1 * weight.topology().num_entries)
            began = time.perf_counter()
        learner.exchange(permutation, known)
        return "exchange", time.perf_counter() - began
    if permutation.soft:
        permutation.nearest()
        return "rounding once", time.perf_counter() - began
    importance = torch.rand(features, features)
    threshold = importance.quantile(0.9) if features < 1000 else 0.9
    site = Site(size=features, importance=importance, best=lambda seen: seen > threshold)
    learner.fit(site, torch.Generator().manual_seed(0))
    return "start once", time.perf_counter() - began


if __name__ == "__main__":
    main()
