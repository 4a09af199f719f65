"""What every suite gets: where and how to measure, and what is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from padst_exp.bench.accuracy import Accuracies
from padst_exp.bench.roofline import Ceilings
from padst_exp.bench.timing import Budget, Call, Clock, alternate, usable

Say = Callable[[str], None]

# Forms of a sparse product: what tables and checks call them.
TRITON, SCATTERED, FEATURES = "packed, triton", "packed, scattered", "features, triton"

# Shortest timing in seconds: long enough for the clock, or for a GPU to settle.
BLOCK = {"cpu": 3e-3, "cuda": 2e-2}


@dataclass(frozen=True)
class Session:
    """One run of the benchmarks.

    Args:
        clock: of the device.
        dtype: of weights and activations.
        environment: columns of every row.
        ceilings: of the device, measured in this run.
        accuracies: to look up.
        budget: for one suite.
        rounds: timings of each side; None leaves it to the suite.
        say: takes a line for a person.
        refused: why a kernel may not be timed, by backend, structure, and whether backward.
    """

    clock: Clock
    dtype: torch.dtype
    environment: Mapping[str, object]
    ceilings: Ceilings
    accuracies: Accuracies
    budget: Budget
    rounds: int | None
    say: Say
    refused: Mapping[tuple[str, str, bool], str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Of the clock."""
        return self.clock.device

    def within(self, budget: Budget) -> Session:
        """The same with another budget."""
        return replace(self, budget=budget)

    def portable(self) -> Session:
        """The same for another process, which says nothing and has all the time it needs."""
        return replace(self, say=_nothing, budget=Budget(None))

    def alternate(
        self,
        calls: Mapping[str, Call],
        *,
        rounds: int,
        block: float | None = None,
        passes: Mapping[str, int] | None = None,
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of each call that runs, see `timing.alternate`; why others do not."""
        ran, failed = usable(calls, self.clock.wait, self.budget)
        for name, reason in failed.items():
            self.say(f"{name}: skipped, {reason}")
        rounds = self.rounds or rounds
        block = BLOCK[self.device.type] if block is None else block
        # Every timing comes after as long a call that is not timed, at worst.
        fair = max(0.0, self.budget.left) / (2 * rounds * max(1, len(ran)))
        samples = alternate(
            ran,
            self.clock,
            rounds=rounds,
            block=min(block, max(fair, BLOCK[self.device.type])),
            budget=self.budget,
            passes=passes,
        )
        return samples, failed


def _nothing(line: str) -> None:
    pass
