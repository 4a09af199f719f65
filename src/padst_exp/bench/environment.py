"""Where and with what something was measured: the columns that every row has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from padst_exp.dispatch import device_name
from padst_exp.engine.run_directory import environment as run_environment

# Where the operating system does not tell.
LAST_LEVEL_CACHE = 32 << 20
MAX_ROTATION = 512


def environment(device: torch.device, dtype: torch.dtype, clock: str) -> dict[str, object]:
    """Columns of every row."""
    commit = run_environment(str(device))
    on_cpu = device.type == "cpu"
    return {
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability() if on_cpu else "",
        "threads": torch.get_num_threads() if on_cpu else "",
        "clock": clock,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__.partition("+")[0],
        "triton": _version("triton"),
        "commit": str(commit["git_commit"] or "unknown")[:10],
        "dirty": commit["git_dirty"],
    }


def label(device: torch.device, dtype: torch.dtype) -> str:
    """Part of a file name, such as `nvidia-h200-bfloat16` or `amd-epyc-2-threads-float32`."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    if device.type == "cpu" and torch.get_num_threads() > 1:
        name += f"-{torch.get_num_threads()}-threads"
    return f"{name}-{str(dtype).removeprefix('torch.')}"


def last_level_cache(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(_cache_sizes(), default=LAST_LEVEL_CACHE)


def rotation(size: int, device: torch.device) -> int:
    """How many weights of `size` bytes do not fit into the last-level cache, by far."""
    return max(2, min(MAX_ROTATION, 5 * last_level_cache(device) // (2 * max(1, size))))


def _cache_sizes() -> Iterator[int]:
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if match:
            yield int(match[1]) << {"K": 10, "M": 20}[match[2]]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
