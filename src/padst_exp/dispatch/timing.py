"""Times of several ways to compute one thing, measured once on a machine and kept on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock

import padst_kernels
from padst_exp import cache
from padst_kernels.compiled import compiled, sources

# Rounds of one timing of every candidate, in turn; at least this long a timing, in seconds.
ROUNDS = 5
TIMING = 2e-3


def timings(
    what: Mapping[str, object],
    calls: Callable[[], Mapping[str, Callable[[], object]]],
    *,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of each way to compute `what` on this machine, from the cache or measured now.

    They are kept in the cache folder (`PADST_CACHE`, else `~/.cache/padst_exp`) under the hash of
    `what` and everything else a timing depends on: device, threads, instruction set, versions, and
    the source of the kernels.

    Args:
        what: plain values that say what is computed; token counts should be bucketed.
        calls: makes the candidates by name, only if there is something to measure.
        device: where they run; a GPU is waited for.

    Returns:
        The median time of one call of each candidate.

    Raises:
        RuntimeError: there is something to measure in the middle of a compilation or a capture.
    """
    key = json.dumps({**what, **_machine(device)}, sort_keys=True)
    name = f"timings/{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    def measured() -> str:
        return json.dumps(measure(calls(), device))

    def measured_alone() -> str:
        if is_recording(device):
            raise RuntimeError("nothing can be measured while a model is compiled or captured")
        # Processes that start together measure one after the other, undisturbed, and agree.
        with _locked(cache.cache_folder() / "timings.lock"):
            return json.dumps(cache.cached(name, measured, _times))

    return cache.cached(name, measured_alone, _times)


def is_recording(device: torch.device) -> bool:
    """Whether what runs now is being compiled or captured: a timing would end up in that."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or capturing


def measure(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of one call of each, interleaved, so that all meet the same disturbances."""
    repeats = {}
    for name, call in calls.items():
        call()
        once = _time(call, 1, device)
        repeats[name] = max(1, min(1000, round(TIMING / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(_time(call, repeats[name], device) / repeats[name])
    return {name: statistics.median(times) for name, times in samples.items()}


def _time(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The model of a GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _machine(device: torch.device) -> dict[str, object]:
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "instructions": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "triton": version("triton") if device.type == "cuda" else None,
        "kernels": _kernels_digest(),
        "libraries": _libraries() if device.type == "cpu" else None,
    }


@functools.cache
def _libraries() -> list[str]:
    """Names the compiled CPU kernels by source, compiler and CPU; not those that there are not."""
    libraries = (compiled(source) for source in sources())
    return [Path(library._name).stem for library in libraries if library is not None]


@functools.cache
def _kernels_digest() -> str:
    """Changes with any source of the kernels, as their speed may."""
    digest = hashlib.sha256()
    for folder in padst_kernels.__path__:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _times(text: str) -> dict[str, float]:
    """Seconds by name.

    Raises:
        ValueError, TypeError, AttributeError: the text is something else.
    """
    times: dict[str, float] = json.loads(text)
    if not min(map(float, times.values())) > 0:
        raise ValueError(f"no time is {times}")
    return times


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, unless its folder cannot be written."""
    lock = FileLock(path)
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock)
        yield
