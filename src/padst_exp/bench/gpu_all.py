"""Suite `gpu_all`: everything a GPU is wanted for, in one command of less than 8 minutes.

Every kernel is checked against float64 first; what failed, or was not checked, is not timed.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace

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
MODEL_STRUCTURES = ("nm-64", "nm-16")


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


Suite = Callable[[BenchSchema, Session], Iterator[list[Row]]]

# Each suite, its structures, and what it may take of what is left when it begins.
SUITES: list[tuple[str, Suite, tuple[str, ...], float]] = [
    ("model_inference", model_inference.run, MODEL_STRUCTURES, 0.4),
    ("model_train", model_train.run, MODEL_STRUCTURES, 0.4),
    ("layers", layers.run, STRUCTURES, 0.85),
    ("memory", memory.run, MODEL_STRUCTURES[:1], 1.0),
]
ROUNDS = 5


def run(
    settings: BenchSchema, session: Session, plan: Plan | None = None
) -> Iterator[tuple[str, list[Row]]]:
    """Check, then time; rows by suite, each as soon as it is done, "checks" first."""
    structures = [configurations.structure(name) for name in settings.structures or STRUCTURES]
    found = check(session, structures, plan or Plan())
    failed = [result for result in found if not result.passed]
    session.say(f"{SUITE}: {len(found) - len(failed)} of {len(found)} checks passed")
    yield "checks", [row(session, result) for result in found]
    session = replace(session, refused=checks.refused(found, session.dtype))
    for name, suite, names, share in SUITES:
        narrowed = replace(
            settings,
            suite=name,
            rounds=settings.rounds or ROUNDS,
            structures=settings.structures or list(names),
        )
        rows: list[Row] = []
        try:
            for case in suite(narrowed, session.within(session.budget.part(share))):
                rows += case
        except Exception as error:
            # An hour on a GPU is rare: what is measured stays, and other suites get their turn.
            session.say(f"{name}: ended by {type(error).__name__}: {error}")
        if rows:
            yield name, rows


def check(session: Session, structures: Sequence[Structure], plan: Plan) -> list[Check]:
    """Check all kernels of all structures; on a GPU in a process each, since most is compiling."""
    arguments = [
        ([structure], plan.shapes, plan.token_counts, [session.dtype], session.device, plan.density)
        for structure in structures
    ]
    if session.device.type == "cpu":
        return [found for one in arguments for found in checks.run(*one)]
    context = multiprocessing.get_context("spawn")
    workers = min(len(structures), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [found for all_found in pool.map(_checks, arguments) for found in all_found]


def _checks(arguments: tuple[object, ...]) -> list[Check]:
    torch.set_num_threads(1)
    return list(checks.run(*arguments))  # type: ignore[arg-type]


def row(session: Session, found: Check) -> Row:
    """A line of the table of checks."""
    return {"suite": "checks", **asdict(found), "passed": found.passed, **session.environment}
