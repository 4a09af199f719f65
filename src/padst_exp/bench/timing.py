"""Seconds of calls that take turns on one device."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from padst_exp.errors import UserError

Call = Callable[[], object]

# A call of so many seconds finds nothing of its own left in a cache, whoever ran before.
LONG = 0.1
MAX_REPEATS = 10_000
# A spent budget still grants so many rounds.
MIN_ROUNDS = 3
# Share of a budget that first calls, which may compile, leave for the timings.
RESERVED = 0.35


@dataclass(frozen=True)
class Clock:
    """A timer of calls.

    Args:
        device: waited for before and after.
        kind: "wall", or "cpu" for the time of this one thread.
    """

    device: torch.device
    kind: str

    def seconds(self, call: Call, repeats: int = 1) -> float:
        """Mean seconds of one of `repeats` calls."""
        now = time.thread_time if self.kind == "cpu" else time.perf_counter
        self.wait()
        began = now()
        for _ in range(repeats):
            call()
        self.wait()
        return (now() - began) / repeats

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Budget:
    """Seconds of wall time that may be spent, counted from now; infinity for any number."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, negative once overspent."""
        return self._end - time.monotonic()

    def part(self, share: float) -> Budget:
        """A budget of a `share` of what is left."""
        return Budget(max(0.0, share * self.left))


def runnable(
    calls: Mapping[str, Call], clock: Clock, budget: Budget
) -> tuple[dict[str, Call], dict[str, str]]:
    """Call each once; those that ran, and for the others the reason in one line.

    Args:
        calls: the most important ones first; none begins when little of the budget is left.
        clock: waits for the device, whose errors come late.
        budget: seconds for this and for the timings that follow.
    """
    ran: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        if ran and budget.left < RESERVED * budget.seconds < math.inf:
            failed[name] = "no time left"
            continue
        try:
            call()
            clock.wait()
            ran[name] = call
        except Exception as error:  # whatever a library or a compiler raises is the result
            failed[name] = reason(error)
    return ran, failed


def alternate(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    rounds: int,
    block: float,
    budget: Budget,
    passes: Mapping[str, int],
) -> dict[str, list[float]]:
    """Seconds of one pass of each, `rounds` times in turn, so that all meet the same disturbances.

    A timing is a burst of calls, as layers of one kind follow each other in a model. A call that is
    not timed comes before it, since other calls have used the caches.

    Args:
        calls: have run before.
        clock: reads the time.
        rounds: timings of each; fewer where the budget is spent.
        block: seconds that a timing takes at least.
        budget: looked at before every round.
        passes: how many of them one call makes, where more than one.
    """
    once = {name: clock.seconds(call) for name, call in calls.items()}
    repeats = {n: min(MAX_REPEATS, math.ceil(block / max(s, 1e-7))) for n, s in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        if done >= MIN_ROUNDS and budget.left < 0:
            break
        for name, call in calls.items():
            if once[name] < LONG:
                call()
            seconds = clock.seconds(call, max(1, repeats[name]))
            samples[name].append(seconds / passes.get(name, 1))
    return samples


def ratio(reference: Sequence[float], samples: Sequence[float]) -> list[float]:
    """Quartiles of reference / samples, each of two neighbouring timings: median, first, third."""
    quartiles = np.quantile(np.divide(reference, samples), [0.5, 0.25, 0.75])
    return [float(value) for value in quartiles]


def reason(error: Exception) -> str:
    """An exception in one line; a mistake of the user by its message alone."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:200]


def captured(call: Call, device: torch.device, repeats: int) -> Call:
    """A CUDA graph of `repeats` calls as one call, which captures when it is first called."""

    @functools.cache
    def graph() -> torch.cuda.CUDAGraph:
        made, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(made):
            for _ in range(repeats):
                call()
        return made

    return lambda: graph().replay()
