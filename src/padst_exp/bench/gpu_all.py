"""Suite `gpu_all`: everything a GPU is wanted for, in one command of less than 8 minutes.

Every kernel is checked against float64 first; what failed, or was not checked, is not timed.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch

from padst_exp.bench import checks, configurations, layers, memory, model_inference, model_train
from padst_exp.bench.checks import Check
from padst_exp.bench.configurations import Shape
from padst_exp.bench.report import Row
from padst_exp.bench.session import Session
from padst_exp.config import BenchSchema
from padst_exp.structures import Structure

SUITE = "gpu_all"
SECONDS = 450.0
STRUCTURES = ("nm-64", "nm-16", "block-64", "block-32", "diag-stride-32", "diag-1", "unstructured")


@dataclass(frozen=True)
class Plan:
    """What is checked.

    Args:
        shapes: of layers.
        token_counts: odd ones, and enough for split sums.
    """

    shapes: Sequence[Shape] = (Shape(768, 3072), Shape(3072, 768))
    token_counts: Sequence[int] = (1, 197, 6001)
    density: float = 0.1


@dataclass(frozen=True)
class Part:
    """Some cases of a suite.

    Args:
        suite: its name.
        run: its function.
        share: of the time that is left when it begins.
        keys: of its settings.
    """

    suite: str
    run: Callable[[BenchSchema, Session], Iterator[list[Row]]]
    share: float
    keys: Mapping[str, list[Any]]

    def settings(self, asked: BenchSchema) -> BenchSchema:
        """What the suite is told: what the user asked for, and `keys` where that was nothing."""
        own: dict[str, Any] = {
            key: getattr(asked, key, None) or value for key, value in self.keys.items()
        }
        # These two are never nothing.
        own |= {key: self.keys[key] for key in ("sparsities", "scopes") if key in self.keys}
        return replace(asked, suite=self.suite, rounds=asked.rounds or ROUNDS, **own)


_MAIN, _ONE = ["nm-64", "nm-16"], ["nm-64"]
_ALL, _BOTH = ["all"], ["all", "dense_qkv"]


def _part(module: ModuleType, share: float, keys: Mapping[str, list[Any]]) -> Part:
    return Part(module.SUITE, module.run, share, keys)


# What an H200 was asked to show comes first; of the rest, as much as there is time for.
PARTS = [
    _part(model_inference, 0.4,
          {"models": ["vit"], "batches": [256], "structures": _MAIN, "scopes": _BOTH}),
    _part(model_train, 0.5,
          {"models": ["vit"], "batches": [256], "structures": _MAIN, "scopes": _ALL}),
    _part(layers, 0.5, {"shapes": ["vit_b"], "structures": _MAIN, "sparsities": [0.9],
                        "tokens": [50432, 1, 197]}),
    _part(model_inference, 0.4,
          {"models": ["vit"], "batches": [1], "structures": _ONE, "scopes": _ALL}),
    _part(memory, 0.4,
          {"models": ["vit"], "batches": [256], "structures": _ONE, "scopes": _ALL}),
    _part(layers, 0.4, {"shapes": ["vit_b"], "structures": list(STRUCTURES[2:]),
                        "sparsities": [0.9]}),
    _part(model_inference, 0.5, {"models": ["vit_large", "gpt2", "gpt2_medium"],
                                 "structures": _ONE, "scopes": _ALL}),
    _part(model_train, 0.5, {"models": ["gpt2"], "structures": _ONE, "scopes": _ALL}),
    _part(layers, 1.0, {"shapes": ["vit_b", "vit_l", "gpt2_xl"], "structures": _MAIN,
                        "sparsities": [0.8, 0.95]}),
]  # fmt: skip
ROUNDS = 5


def run(
    settings: BenchSchema, session: Session, plan: Plan | None = None
) -> Iterator[tuple[str, Iterator[list[Row]]]]:
    """Check, then time: suites, each with the rows of its cases as soon as they are there."""
    structures = [configurations.structure(name) for name in settings.structures or STRUCTURES]
    found: list[Check] = []

    def checked() -> Iterator[list[Row]]:
        for results in check(session, structures, plan or Plan()):
            found.extend(results)
            yield [row(session, result) for result in results]

    yield "checks", checked()
    passed = sum(result.passed for result in found)
    session.say(f"{SUITE}: {passed} of {len(found)} checks passed")
    session = replace(session, refused=checks.refused(found, session.dtype))
    done: list[BenchSchema] = []
    for part in PARTS:
        told = part.settings(settings)
        if told not in done:
            done.append(told)
            yield part.suite, _cases(part, told, session.within(session.budget.part(part.share)))


def _cases(part: Part, told: BenchSchema, session: Session) -> Iterator[list[Row]]:
    """Rows of each case of a part, to the end or up to an error."""
    try:
        yield from part.run(told, session)
    except Exception as error:
        # Minutes on a GPU are rare: what is measured stays, and other parts get their turn.
        session.say(f"{part.suite}: ended by {type(error).__name__}: {error}")


def check(session: Session, structures: Sequence[Structure], plan: Plan) -> Iterator[list[Check]]:
    """Check all kernels by structure; on a GPU in a process each, since most is compiling."""
    arguments = [
        ([structure], plan.shapes, plan.token_counts, [session.dtype], session.device, plan.density)
        for structure in structures
    ]
    if session.device.type == "cpu":
        yield from (list(checks.run(*one)) for one in arguments)
        return
    context = multiprocessing.get_context("spawn")
    workers = min(len(structures), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_checks, arguments)


def _checks(arguments: tuple[object, ...]) -> list[Check]:
    torch.set_num_threads(1)
    return list(checks.run(*arguments))  # type: ignore[arg-type]


def row(session: Session, found: Check) -> Row:
    """A line of the table of checks."""
    return {"suite": "checks", **asdict(found), "passed": found.passed, **session.environment}
