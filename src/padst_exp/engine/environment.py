"""What a number depends on besides the configuration: machine, threads, versions."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from padst_exp.dispatch.timing import device_name

COMPUTING = ("torch", "triton", "timm", "transformers", "numpy")


def numerics(device: torch.device) -> dict[str, Any]:
    """Plain data. Where two of them are equal, so are the sums of the same numbers, bit by bit."""
    return {
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **{name: package_version(name) for name in COMPUTING},
    }


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`name value for value` of all that differs; empty where nothing does."""
    names = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} {now[name]} for {before.get(name)}" for name in names)


def package_version(package: str) -> str | None:
    """None for one that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
