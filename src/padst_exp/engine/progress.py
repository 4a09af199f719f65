"""What a person sees of a run: a bar on a terminal, a line now and then in a log file."""

import sys
import time

from tqdm import tqdm

from padst_exp.messages import say

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows how far a run is.

    Args:
        total: steps of the whole run.
        step: completed steps.
        shown: False on all ranks but 0.
    """

    def __init__(self, *, total: int, step: int, shown: bool) -> None:
        self.total, self.step, self.shown = total, step, shown
        self._first, self._started = step, time.monotonic()
        self._last_line = self._started
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)
            if shown and terminal
            else None
        )

    def advance(self) -> None:
        """Count one step."""
        self.step += 1
        if self._bar is not None:
            self._bar.update()

    def show(self, text: str) -> None:
        """Show `text` (loss, metric, speed) beside the bar, or as a line if one is due."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            return
        now = time.monotonic()
        if self.shown and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            say(f"step {self.step}/{self.total}, {text}, {self._eta(now)} left")

    def say(self, line: str) -> None:
        """Write one line, on rank 0."""
        if self.shown:
            say(line)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _eta(self, now: float) -> str:
        per_step = (now - self._started) / max(1, self.step - self._first)
        return str(tqdm.format_interval(per_step * (self.total - self.step)))
