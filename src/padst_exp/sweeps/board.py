"""How far a sweep is: a bar on a terminal, else a line for each run that ends."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Board:
    """Counts the runs of a sweep.

    Args:
        total: runs that are to be done.
        size: how many run at a time.
    """

    def __init__(self, total: int, size: int) -> None:
        self.total, self.size = total, size
        self.done = self.failed = self.running = 0
        self._started = time.monotonic()
        tqdm.monitor_interval = 0  # its thread would be there while processes are made
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="run", dynamic_ncols=True) if terminal else None

    def count(self, *, failed: bool, running: int) -> None:
        """Note that a run has ended."""
        if failed:
            self.failed += 1
        else:
            self.done += 1
        self.running = running
        if self._bar is not None:
            self._bar.update()

    def show(self, *, running: int) -> None:
        """Note how many are running."""
        if running != self.running and self._bar is not None:
            self._bar.set_postfix_str(f"{running} running, {self.failed} failed")
        self.running = running

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total} done", f"{self.running} running"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if left := self.total - self.done - self.failed - self.running:
            parts.append(f"{left} left")
        if left or self.running:
            parts.append(f"about {tqdm.format_interval(self._seconds_left())} to go")
        return ", ".join(parts)

    def _seconds_left(self) -> float:
        """As if those that run were half done, and all took as long as those that have ended."""
        ended = self.done + self.failed
        seconds = (time.monotonic() - self._started) / max(1, ended + self.running / 2)
        return seconds * (self.total - ended - self.running / 2)
