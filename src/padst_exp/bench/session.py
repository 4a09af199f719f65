"""What every suite gets: where and how to measure, and what is known beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from padst_exp.bench.accuracy import Accuracies
from padst_exp.bench.roofline import Ceilings
from padst_exp.bench.timing import Budget, Call, Clock, alternate, usable

Say = Callable[[str], None]
Cell = TypeVar("Cell")

# Forms of a sparse product: what tables and checks call them.
TRITON, SCATTERED, FEATURES = "packed, triton", "packed, scattered", "features, triton"

# Shortest timing in seconds: long enough for the clock, or for a GPU to settle.
BLOCK = {"cpu": 3e-3, "cuda": 2e-2}


@dataclass(frozen=True)
class Session:
    """One run of the benchmarks.

    Args:
        clock: of the device.
        generator: of the device. Its own, since a failed capture can spoil PyTorch's.
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
    generator: torch.Generator
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

    def random(self, *size: int) -> Tensor:
        """Normal activations or weights."""
        return torch.randn(size, generator=self.generator, device=self.device, dtype=self.dtype)

    def affordable(self, suite: str, cells: Sequence[Cell]) -> Iterator[Cell]:
        """`cells` while there is time for one as long as the longest so far; says what is left."""
        longest = 0.0
        for done, cell in enumerate(cells):
            if self.budget.left <= longest:
                self.say(f"{suite}: budget spent, {len(cells) - done} of {len(cells)} cells left")
                return
            began = time.monotonic()
            yield cell
            longest = max(longest, time.monotonic() - began)

    def alternate(
        self,
        calls: Mapping[str, Call],
        *,
        rounds: int,
        block: float | None = None,
        passes: Mapping[str, int] | None = None,
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        """Seconds of each call that runs, see `timing.alternate`; why others do not."""
        budget = self.budget.part(1)
        ran, failed = usable(calls, self.clock.wait, budget)
        for name, reason in failed.items():
            self.say(f"{name}: skipped, {reason}")
        rounds = self.rounds or rounds
        block = BLOCK[self.device.type] if block is None else block
        # Every timing comes after as long a call that is not timed, at worst.
        fair = max(0.0, budget.left) / (2 * rounds * max(1, len(ran)))
        samples = alternate(
            ran,
            self.clock,
            rounds=rounds,
            block=min(block, max(fair, BLOCK[self.device.type])),
            budget=budget,
            passes=passes,
        )
        return samples, failed


def _nothing(line: str) -> None:
    pass
