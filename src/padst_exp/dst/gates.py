"""A gate that opens by magnitude: hard in the forward pass, wider in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_exp.dst.selection import Gate, Gated
from padst_exp.dst.topology import Topology
from padst_exp.errors import require
from padst_exp.pools import best_of_each
from padst_exp.soft import Learner, Readiness, Soft


class MagnitudeGate(Gate):
    """The largest units of each pool count; those and some more get gradients.

    Args:
        topology: of the weight; its `target` says how many units of each pool count.
        learning: int64 `[P]`, how many units of each pool get gradients; at least the target.
        kept_decay: factor of the value that is added to the gradient of what counts.
        other_decay: the same for what else gets gradients.
    """

    learning: Tensor

    def __init__(
        self, topology: Topology, learning: Tensor, *, kept_decay: float, other_decay: float
    ) -> None:
        super().__init__(topology)
        self.register_buffer("learning", learning, persistent=False)
        self.most = int(learning.max())
        self.kept_decay = kept_decay
        self.other_decay = other_decay
        # In a tuple, or it would become a module inside of its own module.
        self._weight: tuple[Gated, ...] = ()
        self._open = True

    @property
    def soft(self) -> bool:
        return self._open

    def attach(self, weight: Gated) -> None:
        self._weight = (weight,)

    @torch.no_grad()
    def coefficients(self) -> Tensor:
        return self._largest(self.target)

    @torch.no_grad()
    def passing(self) -> Tensor:
        return self._largest(self.learning)

    @torch.no_grad()
    def regularize(self) -> None:
        """Add the decay to the gradient of the values."""
        (weight,) = self._weight
        if weight.values.grad is None:
            return
        kept, learning = self.coefficients(), self.passing()
        decay = kept * self.kept_decay + (learning - kept) * self.other_decay
        weight.values.grad.addcmul_(weight.per_value(decay), weight.values)

    def harden(self, choice: Tensor | None = None) -> None:
        super().harden(choice)
        # A choice from elsewhere (an average adopts its model's) counts in full.
        self.last = torch.isin(self.units, self.chosen).to(self.last)
        self._open = False

    def penalty(self) -> Tensor:
        # Forward it is hard already.
        return self.target.new_zeros((), dtype=torch.float32)

    def gain(self) -> Tensor:
        return self.target.new_ones((), dtype=torch.float32)

    @torch.no_grad()
    def nearest(self) -> Tensor:
        return self.chosen.clone() if not self.soft else self.units[self.coefficients() > 0]

    def _largest(self, counts: Tensor) -> Tensor:
        """1 for the units of the largest magnitudes of each pool, else 0: `[N]`."""
        magnitudes = self._weight[0].magnitudes()
        table = magnitudes.new_full((self.num_pools * self.pool_size,), -torch.inf)
        table[self.units] = magnitudes
        # No forward pass is to wait for the device; what learns is more than what counts.
        best = best_of_each(table.view(self.num_pools, self.pool_size), counts, self.most)
        return best.flatten()[self.units].to(magnitudes.dtype)


class GateLearner(Learner):
    """Lets gates be until `freeze`, a share of training, when the units that count then stay."""

    kind = MagnitudeGate
    section = "dst"

    def __init__(self, *, freeze: float, interval: int) -> None:
        require(0 < freeze <= 1, "dst.freeze", freeze, "a share of training in (0, 1]")
        super().__init__(interval=interval)
        self.freeze = freeze

    def regularize_weights(self) -> None:
        for gate in self.choices.values():
            assert isinstance(gate, MagnitudeGate)
            gate.regularize()

    def ready(self, choice: Soft, progress: float) -> Readiness:
        return "deadline" if progress >= self.freeze else None
