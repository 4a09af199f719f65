"""Transport: a soft partition of features acts on the mask of a dense weight, not on its inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from padst_exp.errors import require
from padst_exp.permutations.learners import Relaxed, initial_logits, require_start, single
from padst_exp.permutations.permutation import Permutation, assign
from padst_exp.soft import Readiness, Soft


class Partition(Permutation):
    """Which group of slots each feature belongs to; multiplies by nothing while soft.

    Slots that always live and die together (those of one block column) are a group: which of them
    a feature takes makes no difference, and nothing is spent on learning it. Q `[G, d]` holds the
    shares of each feature in each group: columns add up to 1, rows to the slots of the group.
    Sparse weights whose masks it moves read Q; see `layers.MaskGate`.

    Args:
        logits: `[d, d]`, of single slots; `divide` makes groups of them.
        iterations: rounds of normalisation.

    Attributes:
        groups: int64 `[d]`, the group of each slot.
        sizes: int64 `[G]`, how many slots each group has.
        members: int64 `[G]`, one slot of each group.
        side: of the weight whose features these are.
        final: Q just before hardening; None before.
        on_look: called, without arguments, when the learner looks whether it is ready.
    """

    groups: Tensor
    sizes: Tensor
    members: Tensor

    def __init__(self, logits: Tensor, *, iterations: int) -> None:
        super().__init__(torch.arange(len(logits), device=logits.device), iterations=iterations)
        for name in ("groups", "members"):
            self.register_buffer(name, self.index.clone(), persistent=False)
        self.register_buffer("sizes", torch.ones_like(self.index), persistent=False)
        self.side: Literal["in", "out"] = "in"
        self.final: Tensor | None = None
        self.on_look: list[Callable[[], None]] = []
        self._soften(logits)

    def divide(self, groups: Tensor, side: Literal["in", "out"]) -> None:
        """Let slots with equal `groups` `[d]`, int64 from 0 on, be one; before training."""
        assert self.logits is not None and len(self.logits) == self.size, "divided already"
        self.groups, self.side = groups.to(self.groups), side
        self.sizes = torch.bincount(self.groups)
        self.members = self.groups.argsort(stable=True)[self.sizes.cumsum(0) - self.sizes]
        drawn = self.logits.detach()
        logits = drawn.new_zeros(len(self.sizes), self.size).index_add_(0, self.groups, drawn)
        self._soften(logits / self.sizes.to(drawn).sqrt()[:, None])

    def shares(self) -> Tensor:
        """Q `[G, d]`, differentiable; what it was last once hard."""
        if self.logits is None:
            assert self.final is not None, "hard from the start"
            return self.final
        with torch.autocast(self.logits.device.type, enabled=False):
            return self._balanced(self._wide_logits(), self.iterations).exp()

    def _balanced(self, logits: Tensor, rounds: int) -> Tensor:
        slots = self.sizes.to(logits).log()[:, None]
        for _ in range(rounds):
            logits = (logits.log_softmax(1) + slots).log_softmax(0)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return x

    def relaxed(self) -> Tensor:
        logits = self._wide_logits()
        return torch.eye(self.size, dtype=logits.dtype, device=logits.device)

    def penalty(self) -> Tensor:
        """Return how far Q is from a partition: 1 at uniform, 0 at one. Nothing inside a group."""
        if self.logits is None:
            return torch.zeros((), device=self.index.device)
        if len(self.sizes) == 1:
            return self.logits.sum() * 0
        uniform = (self.sizes / self.size).square().sum()
        return (1 - self.shares().square().sum() / self.size) / (1 - uniform)

    @torch.no_grad()
    def nearest(self) -> Tensor:
        if self.logits is None:
            return self.index.clone()
        holds = assign((self.shares() / self.sizes[:, None])[self.groups])
        return holds if self.side == "in" else holds.argsort()

    @torch.no_grad()
    def project_(self) -> None:
        if self.logits is not None:
            self.logits.copy_(self._balanced(self.logits, 1))

    @torch.no_grad()
    def harden(self, choice: Tensor | None = None) -> None:
        if self.logits is not None:
            self.final = self.shares()
            self.on_look.clear()
        super().harden(choice)


@dataclass(kw_only=True, eq=False)
class Transport(Relaxed):
    """Learns where features go by moving the mask over a dense weight, which then becomes sparse.

    While soft, an entry of the dense weight W counts sqrt(D), D = A Q the share of it that lies
    under active units A. Whatever Q is, D adds up to the active entries in every row, so that no
    output loses its variance; values never change their features. At each look A is chosen anew
    by the energy that Q lays under each unit. Once hard, S takes the values under its units.

    Args:
        iterations: rounds of normalisation.
        scale: of the initial logits, scale * randn.
        side, lr, betas, weighting, weight, ramp_start, ramp_end, delta, deadline, interval, clip:
            as in `Relaxed`.
    """

    moves_masks = True

    iterations: int
    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require_start(self.iterations, "lognormal", self.scale)
        one = "in, out or auto: a mask is moved along one side"
        require(self.side != "both", "permutation.side", self.side, one)

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        if size == 1:
            return single(generator)
        logits = initial_logits((size, size), "lognormal", self.scale, generator)
        return Partition(logits, iterations=self.iterations)

    def ready(self, choice: Soft, progress: float) -> Readiness:
        assert isinstance(choice, Partition)
        for look in choice.on_look:
            look()
        return super().ready(choice, progress)
