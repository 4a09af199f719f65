"""A few steps of a run as PyTorch's profiler sees them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from padst_exp.atomic import replace_text, replacing
from padst_exp.errors import require

# Steps before the profiled ones: compilations, caches, and the start of the profiler itself.
WARMUP = 10
ROWS = 100


class StepProfiler:
    """Profiles so many steps of one process after a warm-up, once in the life of a run.

    It writes `table.txt`, operations by their own time, and then `trace.json`, which
    chrome://tracing and Perfetto open. What is due between two steps is in the trace as well.

    Args:
        steps: to profile; None: nothing is.
        folder: for the files; where there is a trace already, nothing is profiled.
        device: of the training.
        left: steps that the training still has.
        say: takes a line for a person.
    """

    def __init__(
        self,
        steps: int | None,
        *,
        folder: Path,
        device: torch.device,
        left: int,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.device, self.say = folder, device, say
        self._left = self._steps = steps or 0
        self._profile: Any = None
        if steps is None or self.trace.exists():
            return
        if left < WARMUP + steps:
            needed = f"{WARMUP} steps and {steps} to profile"
            self.say(f"trainer.profile: nothing is profiled, {needed} do not fit into {left}")
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it speaks of GPUs that are not there
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._left += WARMUP
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WARMUP - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    @staticmethod
    def require_steps(steps: int | None, total: int) -> None:
        """Raise a `UserError` where a run of `total` steps is too short."""
        wanted = f"at most {total - WARMUP}, the {total} steps of the run without {WARMUP} before"
        require(steps is None or steps + WARMUP <= total, "trainer.profile", steps, wanted)

    @property
    def trace(self) -> Path:
        """There once a profile is complete."""
        return self.folder / "trace.json"

    def step(self) -> None:
        """Count a step; after the last of them the files are written."""
        if self._profile is None:
            return
        self._left -= 1
        self._profile.step()
        if not self._left:
            self._profile.stop()
            self._profile = None

    def close(self) -> None:
        """End a profile that is not complete, and write none of it."""
        if self._profile is not None:
            self._profile.on_trace_ready = None
            self._profile.stop()
            self._profile = None

    def _write(self, done: profile) -> None:
        own = f"self_{self.device.type}_time_total"
        table = done.key_averages().table(sort_by=own, row_limit=ROWS)
        # A run that trains well is not ended by what it tells of itself.
        try:
            replace_text(self.folder / "table.txt", f"{self._steps} steps\n{table}\n")
            with replacing(self.trace) as file:
                done.export_chrome_trace(file.name)
        except OSError as error:
            self.say(f"warning: no profile could be written to {self.folder}: {error}")
            return
        self.say(f"profiled {self._steps} steps: {self.folder}")
