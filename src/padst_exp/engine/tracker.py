"""What the topologies of a model have been through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from padst_exp.layers import Move, SparseWeight


class TopologyTracker:
    """Counts changes for the summary. Follows every change of topology.

    Attributes:
        initial: int32 active units of each weight before the first step.
        updates: steps at which topologies changed so far.
        replaced: units grown, per weight, summed over the updates.
        seen: bool, which units of each weight have ever been active.
    """

    def __init__(self, weights: Mapping[str, SparseWeight]) -> None:
        self.initial = {name: weight.active.clone() for name, weight in weights.items()}
        self.updates = 0
        self.replaced = dict.fromkeys(weights, 0)
        self.seen = {name: _first_seen(weight) for name, weight in weights.items()}

    def follow(self, name: str, weight: SparseWeight, move: Move, step: int) -> None:
        """Count one change of one weight."""
        self.seen[name].index_fill_(0, move.change.active.long().cpu(), True)
        self.replaced[name] += move.num_grown

    def explored(self, name: str, weight: SparseWeight) -> float:
        """Share of the units of a weight that have ever been active (R in Liu et al. 2021)."""
        return int(self.seen[name].sum()) / int(weight.geometry.candidates.sum())

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; `initial` follows from the seed."""
        return {"updates": self.updates, "replaced": self.replaced, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.updates = state["updates"]
        self.replaced = {name: int(state["replaced"][name]) for name in self.replaced}
        for name, seen in self.seen.items():
            seen.copy_(state["seen"][name])


def _first_seen(weight: SparseWeight) -> Tensor:
    size = weight.geometry.num_pools * weight.geometry.pool_size
    # On the host: one bool for every candidate is as much as the values of a 90% sparse weight.
    seen = torch.zeros(size, dtype=torch.bool)
    seen[weight.active.long().cpu()] = True
    return seen


class Births:
    """The step at which every active unit was grown, for algorithms that ask for its age.

    Attributes:
        steps: int64 `[N]` of each weight, by name.
    """

    def __init__(self, weights: Mapping[str, SparseWeight]) -> None:
        self.steps = {name: torch.zeros_like(w.active.long()) for name, w in weights.items()}

    def follow(self, name: str, weight: SparseWeight, move: Move, step: int) -> None:
        """Move the births of one weight; what is grown is born now."""
        self.steps[name] = move.units(self.steps[name], fill=step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        for name, steps in self.steps.items():
            # In place: of as many units as are active.
            steps.copy_(state["steps"][name])
