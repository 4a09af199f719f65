"""Givens pairs: hard permutations, pairs of whose features turn into each other and are rounded."""

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import cast

import torch
from torch import Tensor, nn

from padst_exp.errors import require
from padst_exp.permutations.exchange import Evidence, Exchange
from padst_exp.permutations.learners import (
    PermutationLearner,
    Side,
    require_adam,
    require_span,
    single,
)
from padst_exp.permutations.pairs import disjoint_pairs
from padst_exp.permutations.permutation import Permutation
from padst_exp.soft import Readiness, Soft


class TurningPermutation(Permutation):
    """M = R P: a hard permutation P, then rotations R of disjoint pairs of what it puts out.

    Position i becomes cos(a) x_i + sin(a) x_j and its partner j becomes cos(a) x_j - sin(a) x_i:
    no norm is lost at any angle, at 0 nothing happens, at 90 degrees they have changed places, one
    with another sign.

    Args:
        index: int64 `[d]`, the first P.

    Attributes:
        current: int64 `[d]`, P.
        partner: int64 `[d]`, whom a position turns towards; itself where it does not.
        logits: `[d]`, the angle of each position; that of the lower one of a pair counts.
    """

    current: Tensor
    partner: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__(index)
        self.register_buffer("current", index.clone())
        self.register_buffer("partner", torch.arange(self.size, device=index.device))
        self._soften(torch.zeros(self.size, device=index.device))

    def angles(self) -> Tensor:
        """The angle of every position `[d]`, opposite ones for partners. Differentiable."""
        own = torch.arange(self.size, device=self.partner.device)
        sign = (self.partner > own).int() - (self.partner < own).int()
        return self._wide_logits()[torch.minimum(own, self.partner)] * sign

    def forward(self, x: Tensor) -> Tensor:
        if self.logits is None:
            return x
        x = x.index_select(-1, self.current)
        with torch.autocast(x.device.type, enabled=False):
            angles = self.angles()
            cosines, sines = angles.cos(), angles.sin()
        return x * cosines.to(x.dtype) + x.index_select(-1, self.partner) * sines.to(x.dtype)

    def relaxed(self) -> Tensor:
        angles = self.angles()
        eye = torch.eye(self.size, dtype=angles.dtype, device=angles.device)
        turned = angles.cos()[:, None] * eye + angles.sin()[:, None] * eye[self.partner]
        return turned[:, self.current.argsort()]

    def penalty(self) -> Tensor:
        """Return the mean of sin^2 of twice the angles: 1 half-way, 0 at a permutation."""
        if self.logits is None:
            return torch.zeros((), device=self.index.device)
        return (2 * self.angles()).sin().square().mean()

    @torch.no_grad()
    def quarters(self) -> Tensor:
        """The angle of every position in whole quarters of a turn, 0 .. 3, int64 `[d]`."""
        return (self.angles() / (math.pi / 2)).round().long() % 4

    @torch.no_grad()
    def nearest(self) -> Tensor:
        if self.logits is None:
            return self.index.clone()
        return torch.where(self.quarters() % 2 == 1, self.current[self.partner], self.current)

    def project_(self) -> None:
        return

    def held(self) -> Tensor:
        return self.index if self.logits is None else self.current

    @torch.no_grad()
    def exchange(self, proposal: Exchange) -> None:
        if self.logits is None:
            super().exchange(proposal)
            return
        assert proposal.partner is not None
        self.current.copy_(proposal.index)
        self.partner.copy_(proposal.partner)
        self.logits.zero_()


class Givens(PermutationLearner):
    """Turns pairs of features into each other, round by round, and rounds every turn.

    Each round pairs those positions whose turn lowers the loss fastest, as far as both halves of
    the samples agree on its direction: with C the gradient of the permutation matrix, the slope at
    angle 0 is C_ij - C_ji. Adam then turns them, under a penalty that grows from 0 to `weight`
    times the task's gradient; at the end of the round angles become multiples of 90 degrees, and
    values take over the signs.

    Args:
        side: as in `PermutationLearner`.
        pairs: share of the positions that turn in a round, at most.
        lr: of Adam, which begins anew with each round.
        betas: of Adam.
        weight: of the penalty sin^2(2 angle) at the end of a round, relative to the task.
        start: fraction of training before the first round.
        deadline: fraction of training after which no round begins.
        interval: optimizer steps of a round.
    """

    parts = 2

    def __init__(
        self,
        *,
        side: Side,
        pairs: float,
        lr: float,
        betas: tuple[float, float],
        weight: float,
        start: float,
        deadline: float,
        interval: int,
    ) -> None:
        super().__init__(side=side, interval=interval)
        require_adam(lr, betas)
        require(0 < pairs <= 1, "permutation.pairs", pairs, "a share of features in (0, 1]")
        require(weight >= 0, "permutation.weight", weight, "at least 0")
        require_span(start, deadline)
        self.pairs = pairs
        self.lr = lr
        self.betas = betas
        self.weight = weight
        self.begin = start
        self.deadline = deadline
        self._closing = False

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        if size == 1:
            return single(generator)
        return TurningPermutation(
            torch.randperm(size, generator=generator, device=generator.device)
        )

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer | None:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas)

    def regularize(self, progress: float) -> None:
        assert self._optimizer is not None
        for choice in self.choices.values():
            logits = choice.logits
            if logits is None or logits.grad is None:
                continue
            done = float(self._optimizer.state.get(logits, {}).get("step", 0))
            (penalty,) = torch.autograd.grad(choice.penalty(), logits)
            scale = logits.grad.norm() / penalty.norm()
            scale = torch.where(scale.isfinite(), scale, 0)
            logits.grad.add_(penalty * (self.weight * min(1.0, done / self.interval) * scale))

    def exchanges(self, step: int, total: int, *, rewiring: bool) -> Mapping[str, Permutation]:
        self._closing = step / total >= self.deadline or step == total
        due = self._closing or step / total >= self.begin
        ready = step % self.interval == 0 or step == total
        return cast(Mapping[str, Permutation], self.choices) if due and ready else {}

    @torch.no_grad()
    def exchange(self, permutation: Permutation, evidence: Evidence | None) -> Exchange | None:
        assert isinstance(permutation, TurningPermutation) and evidence is not None
        assert self._optimizer is not None and permutation.logits is not None
        self._optimizer.state.pop(permutation.logits, None)
        index, quarters = permutation.nearest(), permutation.quarters()
        # cos and sin of the angles, one of which is zero: the sign of what a position holds now.
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0], device=index.device)[quarters]
        partner = torch.arange(len(index), device=index.device)
        slot = index if evidence.side == "out" else partner
        if not self._closing:
            # Gradients are those of what a position holds with its sign.
            active, values = evidence.active[:, slot], evidence.values[:, slot] * signs
            slopes = [values.T @ (part[:, slot] * signs) for part in evidence.gradients]
            partner = self._paired([slope - slope.T for slope in slopes], active)
        by_slot = torch.empty_like(signs)
        by_slot[slot] = signs
        return Exchange(index=index, carry=False, signs=by_slot, partner=partner)

    def _paired(self, slopes: list[Tensor], active: Tensor) -> Tensor:
        """Return partners `[d]`: disjoint pairs of the steepest slopes, where halves agree."""
        size = active.shape[1]
        total = sum(slopes[1:], slopes[0]).abs()
        agreed = torch.stack([slope.sign() for slope in slopes]).sum(0).abs() == len(slopes)
        # Positions that the same rows read in the same way cannot gain by turning.
        shared = active.float().T @ active.float()
        counts = shared.diagonal()
        alike = (shared == counts) & (shared == counts[:, None])
        partner = torch.arange(size, device=active.device)
        pairs = disjoint_pairs(total.masked_fill(~agreed | alike, 0))
        for one, other in islice(pairs, max(1, int(self.pairs * size / 2))):
            partner[one], partner[other] = other, one
        return partner

    def ready(self, choice: Soft, progress: float) -> Readiness:
        return "deadline" if progress >= self.deadline else None
