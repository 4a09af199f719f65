"""Units chosen by a learned importance: DynaDiag (Tyagi et al. 2025), over any structure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from padst_exp.dst.choosing import Choosing
from padst_exp.dst.selection import Gate, Selection
from padst_exp.dst.topology import Topology
from padst_exp.errors import require
from padst_exp.soft import Learner, Readiness, Soft

# Above it the units that are dropped at the freeze would still count as much as those that stay.
MAX_FINAL_TEMPERATURE = 0.5


class DynaDiag(Choosing):
    """All units of a weight live at first, weighed by a soft top-k of their importances.

    The temperature of the soft top-k falls from `temperature` to `final_temperature`; at `freeze`
    the units of the largest importances stay, their values times their coefficients, and all
    others go.

    Args:
        temperature: at the beginning; importances start equal.
        final_temperature: at the freeze. The closer to 0, the smaller the step of the output there.
        schedule: "cosine", "linear", or "constant": the final temperature from the beginning.
        freeze: share of training.
        l1: weight of the sum of the absolute importances.
        lr: of the importances, by Adam, constant, without weight decay.
        interval: optimizer steps between two looks whether it is time to freeze.
    """

    def __init__(
        self,
        *,
        temperature: float,
        final_temperature: float,
        schedule: Literal["cosine", "linear", "constant"],
        freeze: float,
        l1: float,
        lr: float,
        interval: int,
    ) -> None:
        require(
            0 < final_temperature <= MAX_FINAL_TEMPERATURE,
            "dst.final_temperature",
            final_temperature,
            f"positive and at most {MAX_FINAL_TEMPERATURE}, so that the top-k is hard in the end",
        )
        require(
            temperature >= final_temperature,
            "dst.temperature",
            temperature,
            f"at least dst.final_temperature={final_temperature}",
        )
        require(
            schedule in ("cosine", "linear", "constant"),
            "dst.schedule",
            schedule,
            "cosine, linear or constant",
        )
        require(0 < freeze <= 1, "dst.freeze", freeze, "a share of training in (0, 1]")
        require(l1 >= 0, "dst.l1", l1, "at least 0")
        require(lr > 0, "dst.lr", lr, "positive")
        self.temperature = temperature
        self.final_temperature = final_temperature
        self.schedule = schedule
        self.freeze = freeze
        self.selection_learner = ImportanceLearner(self, l1=l1, lr=lr, interval=interval)

    def temperature_at(self, progress: float) -> float:
        """The temperature after a share `progress` of the training."""
        if self.schedule == "constant":
            return self.final_temperature
        share = min(progress / self.freeze, 1.0)
        left = 1 - share if self.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
        return self.final_temperature + (self.temperature - self.final_temperature) * left

    def gate(self, topology: Topology) -> Gate:
        zeros = torch.zeros(len(topology.active), device=topology.active.device)
        selection = Selection(topology, zeros)
        selection.temperature.fill_(self.temperature_at(0.0))
        return selection


class ImportanceLearner(Learner):
    """Trains the importances of `algorithm`, cools its soft top-k, and freezes it in time."""

    kind = Selection
    section = "dst"

    def __init__(self, algorithm: DynaDiag, *, l1: float, lr: float, interval: int) -> None:
        super().__init__(interval=interval)
        self.algorithm = algorithm
        self.l1 = l1
        self.lr = lr

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr)

    def regularize(self, progress: float) -> None:
        for choice in self.choices.values():
            logits = choice.logits
            assert logits is not None
            if self.l1 > 0 and logits.grad is not None:
                logits.grad.add_(logits.sign(), alpha=self.l1)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        super().step(progress)
        for choice in self.choices.values():
            assert isinstance(choice, Selection)
            choice.temperature.fill_(self.algorithm.temperature_at(progress))

    def ready(self, choice: Soft, progress: float) -> Readiness:
        return "deadline" if progress >= self.algorithm.freeze else None
