"""Suite `gpu_all`: everything a GPU is wanted for, in one command of less than 8 minutes.

Every kernel is checked against float64 first; what failed, or was not checked, is not timed: see
checks.py for what a check covers. Tables are written case by case, so that a run that is killed
leaves what it has. Where only a few files come back from the GPU, pack them:

    python -m padst_exp.bench suite=gpu_all out=results/kernels; tar cf results.tar results/kernels
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch

from padst_exp.bench import checks, configurations, layers, memory, model_inference, model_train
from padst_exp.bench.check_case import Check
from padst_exp.bench.configurations import Shape, describe
from padst_exp.bench.forms import EVERY
from padst_exp.bench.keys import BenchSchema
from padst_exp.bench.report import Row
from padst_exp.bench.session import Session
from padst_exp.bench.timing import reason
from padst_exp.structures import Structure

SUITE = "gpu_all"
SECONDS = 450.0
CHECK_SECONDS = 150.0
STRUCTURES = ("nm-64", "nm-16", "block-64", "block-32", "diag-stride-32", "diag-1", "unstructured")


@dataclass(frozen=True)
class Point:
    """Where kernels are checked: a layer, its density, and token counts."""

    shape: Shape
    density: float
    token_counts: Sequence[int]


# Every width and density that is timed, joined projections, odd token counts, and enough tokens
# for split sums.
PLAN = (
    Point(Shape(768, 3072), 0.1, (1, 50, 197, 6001)),
    Point(Shape(3072, 768), 0.1, (1, 50, 197, 6001)),
    Point(Shape(768, 2304, split=3), 0.1, (197,)),
    Point(Shape(1024, 4096), 0.2, (197,)),
    Point(Shape(1600, 1600), 0.05, (197,)),
)
Work = Callable[[Structure, Point, torch.dtype, torch.device], list[Check]]


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
        own |= {"suite": self.suite, "rounds": asked.rounds or ROUNDS}
        return replace(asked, **own)


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


def run(settings: BenchSchema, session: Session) -> Iterator[tuple[str, Iterator[list[Row]]]]:
    """Check, then time: suites, each with the rows of its cases as soon as they are there."""
    structures = [configurations.structure(name) for name in settings.structures or STRUCTURES]
    found: list[Check] = []

    def checked() -> Iterator[list[Row]]:
        for results in check(session, structures):
            found.extend(results)
            yield [row(session, result) for result in results]

    yield "checks", checked()
    passed = sum(result.passed for result in found)
    session.say(f"{SUITE}: {passed} of {len(found)} checks passed")
    session = replace(session, verdicts=checks.verdicts(found, session.dtype))
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
        session.say(f"{part.suite}: ended by {reason(error)}")


def check(session: Session, structures: Sequence[Structure]) -> Iterator[list[Check]]:
    """Check all kernels of all structures, each at each point of `PLAN`."""
    jobs = [(structure, point) for point in PLAN for structure in structures]
    until = time.monotonic() + CHECK_SECONDS
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda job: apart(checks_at, job[0], job[1], session, until), jobs)


def apart(
    work: Work, structure: Structure, point: Point, session: Session, until: float
) -> list[Check]:
    """What `work` finds in a process of its own: a kernel can end it, or never end.

    Args:
        work: of the arguments that follow.
        structure: whose kernels have all failed where no result comes.
        point: of the plan.
        session: whose device and dtype count.
        until: when to stop waiting, of `time.monotonic`.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = sender, work, structure, point, session.dtype, session.device
    process = context.Process(target=_send, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(max(0.0, until - time.monotonic())):
            found: list[Check] | str = receiver.recv()
        else:
            found = "no result in time"
    except EOFError:
        process.join()
        found = f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    if isinstance(found, list):
        return found
    dtype = str(session.dtype).removeprefix("torch.")
    what = f"forward, {point.shape}"
    return [Check(EVERY, describe(structure), what, dtype, math.inf, 1.0, found)]


def _send(sender: Connection, work: Work, structure: Structure, point: Point, *rest: Any) -> None:
    torch.set_num_threads(1)
    try:
        sender.send(work(structure, point, *rest))
    except Exception as failure:
        sender.send(reason(failure))


def checks_at(
    structure: Structure, point: Point, dtype: torch.dtype, device: torch.device
) -> list[Check]:
    """All checks of a structure at a point."""
    return list(
        checks.run(structure, point.shape, point.density, point.token_counts, dtype, device)
    )


def row(session: Session, found: Check) -> Row:
    """A line of the table of checks."""
    return {"suite": "checks", **asdict(found), "passed": found.passed, **session.environment}
