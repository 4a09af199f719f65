"""Refusals of what cannot fit into the memory of this machine, before the kernel kills for it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from padst_exp.errors import UserError, is_lack_of_memory, require

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def total_memory() -> int:
    """Bytes of this machine, or of the container that this process lives in."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # "max", or no such file
        total = min(total, int(CGROUP_LIMIT.read_text()))
    return total


def require_memory(key: str, value: object, size: float) -> None:
    """Raise a `UserError` that names `key` and its `value` if `size` bytes cannot be had."""
    have = total_memory()
    found = f"{value}, which takes {size / 2**30:,.1f} GiB"
    require(size <= have, key, found, f"what fits into {have / 2**30:.1f} GiB of memory")


@contextlib.contextmanager
def fitting(key: str) -> Iterator[None]:
    """Refuse a module that is built here as soon as its parameters exceed the memory.

    Args:
        key: whose sizes are too large, for the message.

    Raises:
        UserError: in one line that names `key`.
    """
    size = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal size
        if parameter is not None and parameter.device.type != "meta":
            size += parameter.numel() * parameter.element_size()
            require_memory(key, "one", size)

    # New memory is given out when it is first written, which is after this.
    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        have = total_memory() / 2**30
        raise UserError(
            f"{key}: expected what fits into {have:.1f} GiB of memory, got one that does not"
        ) from error
    finally:
        hook.remove()
