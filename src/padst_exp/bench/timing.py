"""Seconds of calls that take turns on one device, and the most that the device can do."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from padst_exp.bench.onednn import OneDNNLinear, has_onednn
from padst_exp.errors import UserError

Call = Callable[[], object]

# Shortest timing in seconds: long enough for the clock, or for a GPU to settle.
SHORTEST = {"cpu": 3e-3, "cuda": 2e-2}
# A call of so many seconds finds nothing of its own left in a cache, whoever ran before.
LONG = 0.1
MAX_REPEATS = 10_000
# Side of the square product that shows the rate of a device.
GEMM = {"cpu": 1024, "cuda": 8192}
MAX_ROTATION = 512


@dataclass(frozen=True)
class Timer:
    """Times calls on one device, by the clock "wall", or "cpu" for the time of this one thread."""

    device: torch.device
    clock: str

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
        self, calls: Mapping[str, Call], rounds: int, block: float = 0.0
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of one call of each, in turn, so that all meet the same disturbances.

        A timing is a burst of calls, of at least `block` seconds, as layers of one kind follow each
        other in a model. A call that is not timed comes before it, since other calls have used the
        caches.

        Returns the timings, and the reason in one line for each call that did not run.
        """
        once: dict[str, float] = {}
        failed: dict[str, str] = {}
        for name, call in calls.items():
            try:
                call()
                once[name] = self.seconds(call)
            except Exception as error:  # whatever a library or a compiler raises is the result
                failed[name] = reason(error)
        block = max(SHORTEST[self.device.type], block)
        samples: dict[str, list[float]] = {name: [] for name in once}
        for _ in range(rounds):
            for name, first in once.items():
                if first < LONG:
                    calls[name]()
                repeats = min(MAX_REPEATS, math.ceil(block / max(first, 1e-7)))
                samples[name].append(self.seconds(calls[name], repeats))
        return samples, failed


def reason(error: Exception) -> str:
    """An exception in one line; a mistake of the user by its message alone."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:200]


def last_level_cache(device: torch.device) -> int:
    """Bytes of the last-level cache; 32 MiB where the operating system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)([KM])", path.read_text().strip()) for path in files]
    return max((int(s[1]) << {"K": 10, "M": 20}[s[2]] for s in sizes if s), default=32 << 20)


def rotation(size: int, device: torch.device) -> int:
    """How many weights of `size` bytes exceed the last-level cache by far."""
    return max(2, min(MAX_ROTATION, 5 * last_level_cache(device) // (2 * max(1, size))))


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches in a second: bytes that a copy beyond the cache reads and writes, and
    operations of the fastest dense product."""

    bandwidth: float
    rate: float

    def least_seconds(self, operations: float, moved: float) -> float:
        """Of so many operations on so many bytes from beyond the cache."""
        return max(operations / self.rate, moved / self.bandwidth)


@torch.no_grad()
def ceilings(timer: Timer, dtype: torch.dtype) -> Ceilings:
    """Measure what a device reaches; each ceiling is the best of a few timings."""
    device, side = timer.device, GEMM[timer.device.type]
    source = torch.zeros(4 * last_level_cache(device), dtype=torch.uint8, device=device)
    a = torch.randn(side, side, device=device, dtype=dtype)
    linear = nn.Linear(side, side, bias=False, device=device, dtype=dtype)
    copy = partial(torch.empty_like(source).copy_, source)
    calls: dict[str, Call] = {"copy": copy, "linear": partial(linear, a)}
    if has_onednn(device, dtype):
        calls["oneDNN"] = partial(OneDNNLinear(linear, side), a)
    samples, _ = timer.alternate(calls, rounds=7)
    bandwidth = 2 * len(source) / min(samples.pop("copy"))
    return Ceilings(bandwidth, 2 * side**3 / min(itertools.chain(*samples.values())))
