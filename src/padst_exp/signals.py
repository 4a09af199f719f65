"""The signals that ask a run to end: of schedulers, terminals and people."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Time is up, the machine goes down, the job is cancelled, the terminal is gone, or Ctrl-C.
ENDING = tuple(
    signal.Signals[name]
    for name in (
        "SIGTERM",
        "SIGINT",
        "SIGHUP",
        "SIGQUIT",
        "SIGUSR1",
        "SIGUSR2",
        "SIGXCPU",
        "SIGPWR",
    )
    if hasattr(signal, name)
)
PEOPLE = (signal.SIGINT, signal.SIGQUIT)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""With these a scheduler says that a job will have to go on later."""

REQUEUE = 99
"""Exit status that asks a scheduler to run the job again (Grid Engine by itself, LSF and Slurm when
told so)."""

_PR_SET_PDEATHSIG = 1


def exit_status(signum: int) -> int:
    """Of a process that has saved its work because of a signal; else as shells have it."""
    return REQUEUE if signum in WARNINGS else 128 + signum


@contextmanager
def held() -> Iterator[None]:
    """A block in which these signals wait. Processes started in it never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(worker: int = 0) -> None:
    """In a process that works for another: ignore these signals, and end when the other does.

    They reach all processes of a group or a job; what is to be done about them is the parent's
    business, which it cannot do when its workers are gone.

    Args:
        worker: its number, unused; what a `DataLoader` calls this with.
    """
    for signum in ENDING:
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
