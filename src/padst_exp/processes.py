"""Which process made a file, and whether it still lives: what locks and leftovers are judged by."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, told from all others that ever had its number.

    Args:
        place: hash of its machine since it booted, and of its numbering of processes, which
            containers have of their own; empty where that is not known.
        pid: its number there.
        started: when it began, as this machine counts; empty where that is not known.
    """

    place: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> Process:
        """This process."""
        pid = os.getpid()
        return cls(_place(), pid, _started(pid) or "")

    def lives(self) -> bool | None:
        """Whether it still runs; None where that cannot be told from here, as of another host."""
        if not self.place or self.place != _place():
            return None
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"{self.place}-{self.pid}-{self.started}"

    @classmethod
    def parse(cls, text: str) -> Process | None:
        """What `str` made a text of; None for another text."""
        place, _, numbers = text.partition("-")
        pid, _, started = numbers.partition("-")
        return cls(place, int(pid), started) if pid.isdecimal() else None


@functools.cache
def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        numbering = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    text = f"{socket.gethostname()} {boot} {numbering}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _started(pid: int) -> str | None:
    """When a process began, in clock ticks since the machine did; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may hold anything. A zombie has ended.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
