"""Seconds of calls that alternate, on the device they run on."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from padst_exp.errors import UserError

Call = Callable[[], object]

# Calls at least this long, in seconds, find nothing of themselves left in a cache.
LONG = 0.1
MAX_REPEATS = 10_000
# Rounds that a spent budget still grants.
MIN_ROUNDS = 3
# Share of the budget of one cell that is kept for timing what could be made ready before.
RESERVED = 0.35


@dataclass(frozen=True)
class Clock:
    """Reads the time of calls on one device.

    Args:
        device: is waited for before and after.
        kind: "wall", or "cpu": time of this one thread.
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
    """Seconds of wall time that may be spent.

    Args:
        seconds: from now on; None: any number.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = math.inf if seconds is None else seconds
        self._end = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        """Seconds, negative once overspent."""
        return self._end - time.monotonic()

    def is_below(self, share: float) -> bool:
        """Whether less than a `share` of it is left."""
        return self.left < (0 if math.isinf(self.seconds) else share * self.seconds)

    def part(self, share: float) -> Budget:
        """A budget of a `share` of what is left."""
        return Budget(None if math.isinf(self.seconds) else max(0.0, share * self.left))


def alternate(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    rounds: int,
    block: float,
    budget: Budget,
    passes: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one pass of each, `rounds` times in turn: all meet the same disturbances.

    A timing is a burst of calls, as layers of one kind follow each other in a model. A call that is
    not timed comes before it, since other sides have used the caches.

    Args:
        calls: by name; each is called a few times before anything is timed.
        clock: reads the time.
        rounds: timings of each; fewer where the budget is spent.
        block: seconds that a timing takes at least.
        budget: looked at before every round.
        passes: how many of them one call makes, where more than one.
    """
    passes = passes or {}
    repeats, long = {}, set()
    for name, call in calls.items():
        call()
        once = clock.seconds(call)
        repeats[name] = min(MAX_REPEATS, max(1, math.ceil(block / max(once, 1e-7))))
        if once > LONG:
            long.add(name)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        if done >= MIN_ROUNDS and budget.left < 0:
            break
        for name, call in calls.items():
            if name not in long:
                call()
            samples[name].append(clock.seconds(call, repeats[name]) / passes.get(name, 1))
    return samples


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80 of seconds, in milliseconds."""
    low, middle, high = 1e3 * np.quantile(samples, [0.2, 0.5, 0.8])
    return float(low), float(middle), float(high)


def ratio(reference: list[float], samples: list[float]) -> tuple[float, float, float]:
    """Quartiles of reference / samples, each of two neighbouring timings: first, median, third."""
    neighbours = np.divide(reference, samples)
    low, middle, high = np.quantile(neighbours, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def fastest(samples: Mapping[str, list[float]], names: list[str]) -> str:
    """Which of `names` has the lowest median."""
    return min(names, key=lambda name: float(np.median(samples[name])))


def usable(
    calls: Mapping[str, Call], wait: Call, budget: Budget
) -> tuple[dict[str, Call], dict[str, str]]:
    """Call each once; those that ran, and for the others why not, in one line.

    Args:
        calls: by name, in the order of their importance: the first call of each may compile, and
            none begins when little of the budget is left.
        wait: for the device, whose errors come late.
        budget: in seconds.
    """
    ran: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        if ran and budget.is_below(RESERVED):
            failed[name] = "no time left"
            continue
        try:
            call()
            wait()
        except Exception as error:
            # Whatever a library or a compiler raises: that it cannot run is the result.
            failed[name] = reason(error)
        else:
            ran[name] = call
    return ran, failed


def reason(error: Exception) -> str:
    """An exception in one line; a mistake of the user is told by its message alone."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:200]


def captured(call: Call, device: torch.device, repeats: int = 1) -> Call:
    """A CUDA graph of `repeats` calls, as one call, the first of which captures it."""

    @functools.cache
    def graph() -> torch.cuda.CUDAGraph:
        made = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(made):
            for _ in range(repeats):
                call()
        return made

    return lambda: graph().replay()
