"""Choices of which units of a weight stay."""

from __future__ import annotations

import abc
from typing import Protocol

import torch
from torch import Tensor, nn

from padst_exp.dst.topology import Change, Topology
from padst_exp.pools import best_of_each
from padst_exp.soft import Soft

# Rounds of the search for the thresholds of a soft top-k; more give no other floats.
HALVINGS, NEWTON_STEPS = 14, 8


class Gated(Protocol):
    """What a gate sees of the weight whose units it weighs."""

    values: nn.Parameter

    def magnitudes(self) -> Tensor:
        """Root mean square of the values of each unit, `[N]`, before any weighing."""

    def per_value(self, units: Tensor) -> Tensor:
        """One number for each unit, `[N]`, as a factor of `values`."""


class Gate(Soft):
    """Which active units of a weight stay: a factor for each until then, the chosen ones once hard.

    Args:
        topology: of the weight; its `target` says how many units of each pool stay.

    Attributes:
        units: int64 `[N]`, the ids of the units to choose among.
        chosen: int64 ids of the units that stay, once hard; -1 before.
        last: the coefficients `[N]` when it hardened, which the values take over.
    """

    units: Tensor
    target: Tensor
    chosen: Tensor
    last: Tensor

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.logits = None
        self.num_pools, self.pool_size = topology.num_pools, topology.pool_size
        device = topology.active.device
        nobody = torch.full((int(topology.target.sum()),), -1, device=device)
        self.register_buffer("units", topology.active.clone())
        self.register_buffer("target", topology.target, persistent=False)
        self.register_buffer("chosen", nobody, persistent=False)
        self.register_buffer("last", torch.ones(len(self.units), device=device), persistent=False)

    @property
    def pools(self) -> Tensor:
        """The pool of each unit, int64 `[N]`."""
        return self.units // self.pool_size

    def attach(self, weight: Gated) -> None:
        """Learn whose units these are."""

    @abc.abstractmethod
    def coefficients(self) -> Tensor:
        """What the values of each unit count, `[N]` in 0 .. 1, or each value by itself, `[N, E]`.

        Differentiable where learned.
        """

    def passing(self) -> Tensor | None:
        """`[N]`, what gradients of the values are multiplied by; None: the coefficients."""
        return None

    def shares(self) -> Tensor:
        """What share of the square of each value is to stay, `[N]` or `[N, E]`."""
        return self.coefficients()

    def settled(self) -> Change:
        """Once hard: the change that drops what was not chosen."""
        return Change(self.chosen)

    def taken_over(self) -> Tensor:
        """Once hard: what the values are multiplied by before, `[N]` or `[N, E]`."""
        return self.last

    @torch.no_grad()
    def harden(self, choice: Tensor | None = None) -> None:
        """Become hard; the weight drops the units that were not chosen when it `settle`s."""
        self.last = self.coefficients()
        self.chosen = (self.nearest() if choice is None else choice).to(self.units.device)
        self.logits = None
        self.changed()


class Selection(Gate):
    """A soft top-k of learned importances (DynaDiag, over the units of any structure).

    While soft, the values of unit n count `coefficients()[n]` times, in 0 .. 1; the coefficients
    of a pool add up to the number of its units that are to stay, at every temperature. The larger
    of them survive when it hardens.

    Args:
        topology: of the weight; its `target` says how many units of each pool stay.
        logits: floating point `[N]`, one for each active unit.

    Attributes:
        temperature: a scalar tensor; the lower, the sharper the choice.
    """

    copied = ("temperature",)
    temperature: Tensor

    def __init__(self, topology: Topology, logits: Tensor) -> None:
        super().__init__(topology)
        assert logits.shape == topology.active.shape, logits.shape
        self.logits = nn.Parameter(logits.detach().clone())
        self.last = torch.ones_like(logits)
        self.register_buffer("temperature", logits.new_ones(()))

    def coefficients(self) -> Tensor:
        """`[N]` in 0 .. 1, differentiable in the logits: sigmoid((logit - t) / temperature).

        The threshold t of each pool is such that the coefficients add up to its target.
        """
        logits = self._logits() / self.temperature
        threshold = self._thresholds(logits.detach())[self.pools]
        soft = torch.sigmoid(logits.detach() - threshold)
        # One step of Newton's method is exact at the root, and has the gradient of the threshold.
        slope = (soft * (1 - soft)).clamp_min(torch.finfo(soft.dtype).tiny)
        total = self._per_pool(slope)
        mean = self._per_pool(logits * slope) / total
        threshold = threshold + (mean - mean.detach())[self.pools]
        return torch.sigmoid(logits - threshold)

    def penalty(self) -> Tensor:
        """Sum of c (1 - c) over that of equal coefficients, in the pools that leave a choice."""
        if not self.soft:
            return self.temperature.new_zeros(())
        soft = self.coefficients()
        share = (self.target / self._per_pool(torch.ones_like(soft)))[self.pools].to(soft)
        uniform = share * (1 - share)
        between = (soft * (1 - soft))[uniform > 0].sum()
        return between / uniform.sum().clamp_min(torch.finfo(soft.dtype).tiny)

    @torch.no_grad()
    def gain(self) -> Tensor:
        """Norm of the coefficients over what it is once hard."""
        if not self.soft:
            return self.temperature.new_ones(())
        soft = self.coefficients()
        return soft.norm() / self.target.sum().to(soft).sqrt()

    @torch.no_grad()
    def nearest(self) -> Tensor:
        """Ids of the units with the largest logits of each pool, int64, sorted."""
        if not self.soft:
            return self.chosen.clone()
        scores = self._logits().new_full((self.num_pools * self.pool_size,), -torch.inf)
        scores[self.units] = self._logits()
        best = best_of_each(scores.view(self.num_pools, self.pool_size), self.target)
        return best.flatten().nonzero().squeeze(1)

    def _logits(self) -> Tensor:
        assert self.logits is not None
        return self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))

    def _per_pool(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.num_pools).index_add(0, self.pools, values)

    @torch.no_grad()
    def _thresholds(self, logits: Tensor) -> Tensor:
        """`[P]`: sums of sigmoids fall as the threshold rises.

        Halving comes near the root of each pool. Newton's method ends there, on the odds of the
        sum's share in the pool, whose logarithm bends little; what leaves the bracket halves it.
        """
        spread, target, tiny = 40.0, self.target, torch.finfo(logits.dtype).tiny
        pools = self.pools

        def sums(values: Tensor) -> Tensor:
            return values.new_zeros(self.num_pools).index_add_(0, pools, values)

        size = sums(torch.ones_like(logits))
        wanted = (target / (size - target)).log()
        low = logits.new_full((self.num_pools,), float(logits.min()) - spread)
        high = logits.new_full((self.num_pools,), float(logits.max()) + spread)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = sums(torch.sigmoid(logits - middle[pools])) > target
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        threshold = (low + high) / 2
        for _ in range(NEWTON_STEPS):
            soft = torch.sigmoid(logits - threshold[pools])
            total, slope = sums(soft), sums(soft * (1 - soft))
            above, rest = total > target, (size - total).clamp_min(tiny)
            low, high = torch.where(above, threshold, low), torch.where(above, high, threshold)
            odds = (total.clamp_min(tiny) / rest).log() - wanted
            step = threshold + odds * (total * rest / (slope.clamp_min(tiny) * size))
            inside = (step >= low) & (step <= high)
            threshold = torch.where(inside, step, (low + high) / 2)
        return threshold
