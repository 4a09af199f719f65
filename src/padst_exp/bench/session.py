"""One run of the benchmarks: where it measures, how contenders take turns, what a row says."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from padst_exp.bench.onednn import OneDNNLinear, has_onednn
from padst_exp.dispatch import device_name
from padst_exp.engine.run_directory import environment
from padst_exp.errors import UserError
from padst_exp.permutations import NoPermutation
from padst_exp.soft import Learner

Row = dict[str, Any]
Cell = TypeVar("Cell")
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
def measure_ceilings(timer: Timer, dtype: torch.dtype) -> Ceilings:
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


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute a layer or a model."""

    structure: str = "dense"  # its label; "dense" for none
    form: str  # how weights are stored and multiplied
    modules: Sequence[nn.Module]  # called in turn, so that weights come from memory
    # What PyTorch does by itself, other dense kernels, or neither. Ratios are to the fastest dense
    # one, and to the fastest dense or strong one.
    kind: Literal["dense", "strong", "sparse"] = "sparse"
    scope: str = ""  # which layers of a model are sparse, see `choices.Model.rules`
    permutation: str = "none"  # or "soft", "hard"
    density_asked: float = 1.0
    density: float = 1.0
    trained: bool = True  # whether weights have gradients
    dispatcher: str = ""  # what the dispatcher chose, in one line
    learner: Learner = field(default_factory=NoPermutation)  # of soft permutations
    passes: int = 1  # that one call makes
    floor: float | None = None  # the least seconds of a pass

    def columns(self) -> Row:
        """What rows say of it."""
        names = "structure", "form", "scope", "permutation", "density_asked", "density"
        return {**{name: getattr(self, name) for name in names}, "density": round(self.density, 4)}


@dataclass(frozen=True)
class Session:
    """What every suite gets."""

    timer: Timer  # of the device
    dtype: torch.dtype  # of weights
    autocast: torch.dtype | None  # of products, where not that of weights
    ceilings: Ceilings  # what the device reaches, measured in this run
    columns: Mapping[str, Any]  # of every row: where and with what it was measured
    rounds: int  # timings of each contender
    say: Callable[[str], None]  # takes a line for a person

    @property
    def device(self) -> torch.device:
        """Where everything is measured."""
        return self.timer.device

    def precision(self) -> torch.autocast:
        """The context that models run in."""
        lower = self.autocast is not None
        return torch.autocast(self.device.type, self.autocast or self.dtype, enabled=lower)

    def inputs(self, tensor: Tensor) -> Tensor:
        """Inputs or targets where the model is, in the dtype of its weights."""
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def tried(self, name: str, make: Callable[[], Cell]) -> list[Cell]:
        """What `make` makes, in a list; nothing, and a line about `name`, where that fails."""
        try:
            return [make()]
        except Exception as error:  # libraries and compilers raise what they like; others go on
            self.say(f"{name}: skipped, {reason(error)}")
            return []

    def compare(
        self, about: Row, sides: Sequence[tuple[Contender, Call]], block: float = 0.0
    ) -> pd.DataFrame:
        """Time calls in turn: a row for each that runs, with the columns `about`.

        Milliseconds have four digits. A timing takes at least `block` seconds.
        """
        calls = {str(number): call for number, (_, call) in enumerate(sides)}
        seconds, failed = self.timer.alternate(calls, self.rounds, block)
        for number, why in failed.items():
            one = sides[int(number)][0]
            self.say(f"{one.structure}, {one.form}, {one.permutation}: skipped, {why}")
        timed = [sides[int(number)][0] for number in seconds]
        times = 1e3 * pd.DataFrame(dict(enumerate(seconds.values()))) / [o.passes for o in timed]
        rows = pd.DataFrame([{**about, **one.columns()} for one in timed])
        rows[["p20_ms", "p50_ms", "p80_ms"]] = times.quantile([0.2, 0.5, 0.8]).T
        rows["rounds"] = len(times)
        # Ratios of neighbouring timings, to the fastest of some contenders.
        for prefix, column, kinds in (
            ("dense", "ratio", ("dense",)),
            ("strongest", "ratio_strongest", ("dense", "strong")),
        ):
            others = [number for number, one in enumerate(timed) if one.kind in kinds]
            if others:
                best = rows.p50_ms[others].idxmin()
                rows[f"{prefix}_form"], rows[f"{prefix}_ms"] = rows.form[best], rows.p50_ms[best]
                ratios = times.rdiv(times[best], axis=0).quantile([0.5, 0.25, 0.75]).round(3).T
                rows[[column, f"{column}_q1", f"{column}_q3"]] = ratios
        rows["floor_ms"] = 1e3 * pd.Series([one.floor for one in timed], dtype=float)
        rows["floor_share"] = (rows.floor_ms / rows.p50_ms).round(3)
        rows["dispatcher"] = [one.dispatcher for one in timed]
        digits = [column for column in rows if column.endswith("_ms")]
        rows[digits] = rows[digits].map(lambda value: float(f"{value:.4g}"))
        return rows.assign(**self.columns)


def columns(timer: Timer, dtype: torch.dtype, ceilings: Ceilings) -> Row:
    """Columns of every row: where and with what it is measured."""
    device, run = timer.device, environment(str(timer.device))
    on_cpu, packages = device.type == "cpu", run["packages"]
    assert isinstance(packages, dict)
    return {
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability() if on_cpu else "",
        "threads": torch.get_num_threads() if on_cpu else "",
        "clock": timer.clock,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__.partition("+")[0],
        "triton": packages["triton"] or "",
        "commit": str(run["git_commit"] or "unknown")[:10],
        "dirty": run["git_dirty"],
        "copy_gb_per_s": round(ceilings.bandwidth / 1e9, 1),
        "gemm_gflops": round(ceilings.rate / 1e9, 1),
    }
