"""A training in which all that may move does: counts, choices, and the signals they need.

The first layer starts at twice its density with a soft selection of units; the second one loses
entries at every update, by a score that reads ages and the gradient of its weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from padst_exp.dst import Cubic, DropGrow, DropScore, Gradient, Selection, Signals, Topology
from padst_exp.soft import Learner, Readiness, Soft


class Young(DropScore):
    """Units leave that have small weights and gradients, and are old."""

    needs = frozenset({"weight_gradient", "age"})

    def __call__(self, topology: Topology, signals: Signals) -> Tensor:
        assert signals.weight_gradient is not None and signals.age is not None
        return signals.magnitude * signals.weight_gradient - 1e-3 * signals.age


class Selector(Learner):
    """Hardens selections after three looks, as its own state says."""

    kind = Selection

    def __init__(self) -> None:
        super().__init__(interval=4)
        self.looks = 0

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.1)

    def regularize(self, progress: float) -> None:
        for choice in self.choices.values():
            assert isinstance(choice, Selection)
            choice.temperature.fill_(1 - progress)

    def ready(self, choice: Soft, progress: float) -> Readiness:
        self.looks += 1
        return "deadline" if self.looks == 3 else None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "looks": self.looks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.looks = state["looks"]


class Moving(DropGrow):
    """Drop and grow while the number of entries falls, and a selection in smaller layers."""

    def __init__(self) -> None:
        super().__init__(
            drop=Young(),
            grow=Gradient(),
            counts=Cubic(start=0.8, begin=0.0, end=0.7),
            fraction=0.8,
            interval=5,
            stop=0.75,
            moments="age",
        )
        self.selection_learner = Selector()

    def selection(self, topology: Topology, generator: torch.Generator) -> Selection | None:
        if topology.size >= 1024:
            return None
        return Selection(topology, torch.randn(len(topology.active), generator=generator))
