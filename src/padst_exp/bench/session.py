"""What every suite gets: where and how to measure, and what is known beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, get_args

import torch
from torch import Tensor

from padst_exp.bench.accuracy import Accuracies
from padst_exp.bench.forms import EVERY, packed
from padst_exp.bench.roofline import Ceilings
from padst_exp.bench.timing import Budget, Call, Clock, alternate, reason, usable
from padst_exp.structures import Backend

Say = Callable[[str], None]
Cell = TypeVar("Cell")
Made = TypeVar("Made")

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
        verdicts: see `checks.verdicts`; None where nothing was checked, and all may be timed.
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
    verdicts: Mapping[tuple[str, str, bool], str] | None = None

    @property
    def device(self) -> torch.device:
        """Of the clock."""
        return self.clock.device

    def refusal(self, kernel: str, structure: str, *, backward: bool) -> str:
        """Why a kernel may not be timed for weights of a structure; "" where it may."""
        if self.verdicts is None:
            return ""
        every = self.verdicts.get((EVERY, structure, backward), "")
        return every or self.verdicts.get((kernel, structure, backward), "was not checked")

    def backends(self, structure: str) -> list[Backend]:
        """Those whose products may be used in training: forward and backward pass."""
        return [
            backend
            for backend in get_args(Backend)
            if not any(
                self.refusal(packed(backend), structure, backward=backward)
                for backward in (False, True)
            )
        ]

    def within(self, budget: Budget) -> Session:
        """The same with another budget."""
        return replace(self, budget=budget)

    def portable(self) -> Session:
        """The same for another process, which says nothing and has all the time it needs."""
        return replace(self, say=_nothing, budget=Budget(None))

    def random(self, *size: int) -> Tensor:
        """Normal activations or weights."""
        return torch.randn(size, generator=self.generator, device=self.device, dtype=self.dtype)

    def tried(self, name: str, make: Callable[[], list[Made]]) -> list[Made]:
        """What `make` makes; nothing, and a line about `name`, where that fails."""
        try:
            return make()
        except Exception as error:
            # Libraries and compilers raise what they like, and other sides can go on.
            self.say(f"{name}: skipped, {reason(error)}")
            return []

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
        for name, why in failed.items():
            self.say(f"{name}: skipped, {why}")
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
