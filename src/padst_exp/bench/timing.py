"""Seconds of calls that take turns on one device."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping

import torch

from padst_exp.errors import UserError

Call = Callable[[], object]

# Shortest timing in seconds: long enough for the clock, or for a GPU to settle.
SHORTEST = {"cpu": 3e-3, "cuda": 2e-2}
# A call of so many seconds finds nothing of its own left in a cache, whoever ran before.
LONG = 0.1
MAX_REPEATS = 10_000
# A spent budget still grants so many rounds; first calls, which may compile, leave a share of it.
MIN_ROUNDS, RESERVED = 3, 0.35


class Timer:
    """Times calls on one device within a budget of wall time in seconds, counted from now.

    The clock is "wall", or "cpu" for the time of this one thread.
    """

    def __init__(self, device: torch.device, clock: str, budget: float = math.inf) -> None:
        self.device, self.clock, self.budget = device, clock, budget
        self._end = time.monotonic() + budget

    @property
    def left(self) -> float:
        """Seconds that are left, negative once overspent."""
        return self._end - time.monotonic()

    def part(self, share: float) -> Timer:
        """A timer with a `share` of what is left."""
        return Timer(self.device, self.clock, max(0.0, share * self.left))

    def seconds(self, call: Call, repeats: int = 1) -> float:
        """Mean seconds of one of `repeats` calls."""
        now = time.thread_time if self.clock == "cpu" else time.perf_counter
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        began = now()
        for _ in range(repeats):
            call()
        wait()
        return (now() - began) / repeats

    def alternate(
        self,
        calls: Mapping[str, Call],
        rounds: int,
        block: float = 0.0,
        passes: Mapping[str, int] | None = None,
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of one pass of each, in turn, so that all meet the same disturbances.

        A timing is a burst of calls, of `block` seconds if the budget allows, as layers of one kind
        follow each other in a model. A call that is not timed comes before it, since other calls
        have used the caches. A spent budget means fewer rounds, and that first calls, the most
        important ones first, do not begin. `passes`: how many passes one call makes, if not one.

        Returns the timings, and the reason in one line for each call that did not run.
        """
        once: dict[str, float] = {}
        failed: dict[str, str] = {}
        for name, call in calls.items():
            if once and self.left < RESERVED * self.budget < math.inf:
                failed[name] = "no time left"
                continue
            try:
                call()
                once[name] = self.seconds(call)
            except Exception as error:  # whatever a library or a compiler raises is the result
                failed[name] = reason(error)
        # Every timing comes after as long a call that is not timed, at worst.
        fair = max(0.0, self.left) / (2 * rounds * max(1, len(once)))
        block = max(SHORTEST[self.device.type], min(block, fair))
        samples: dict[str, list[float]] = {name: [] for name in once}
        for done in range(rounds):
            if done >= MIN_ROUNDS and self.left < 0:
                break
            for name, first in once.items():
                if first < LONG:
                    calls[name]()
                repeats = min(MAX_REPEATS, math.ceil(block / max(first, 1e-7)))
                seconds = self.seconds(calls[name], repeats)
                samples[name].append(seconds / (passes or {}).get(name, 1))
        return samples, failed


def reason(error: Exception) -> str:
    """An exception in one line; a mistake of the user by its message alone."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:200]


def captured(call: Call, repeats: int) -> Call:
    """A CUDA graph of `repeats` calls as one call, which captures when it is first called."""

    @functools.cache
    def graph() -> torch.cuda.CUDAGraph:
        made, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(made):
            for _ in range(repeats):
                call()
        return made

    return lambda: graph().replay()
