"""Permutations within groups: one small doubly stochastic matrix for each group of features."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from padst_exp.errors import require
from padst_exp.permutations.learners import (
    Init,
    Relaxed,
    initial_logits,
    require_start,
    single,
)
from padst_exp.permutations.permutation import Permutation, assign
from padst_exp.permutations.sinkhorn import sinkhorn


class GroupedPermutation(Permutation):
    """M = B P0: a fixed random permutation P0 deals features to groups, B is block-diagonal.

    Only what P0 put into one group can be exchanged, for d * g logits instead of d * d (PermLLM,
    arXiv 2510.10136; there P0 is the identity).

    Args:
        logits: `[G, g, g]`, one matrix for each group; of a last narrower group, rows and columns
            beyond it count nothing.
        dealt: `[d]`, int64: P0.
        iterations: rounds of Sinkhorn.
    """

    dealt: Tensor

    def __init__(self, logits: Tensor, dealt: Tensor, *, iterations: int) -> None:
        super().__init__(dealt, iterations=iterations)
        self.register_buffer("dealt", dealt.clone())
        number, width, _ = logits.shape
        inside = torch.arange(number * width, device=dealt.device) < self.size
        inside = inside.view(number, width)
        # What stands beyond the last feature maps to itself and to nothing else.
        apart = inside[:, :, None] != inside[:, None, :]
        beyond = ~(inside[:, :, None] | inside[:, None, :])
        apart |= beyond & ~torch.eye(width, dtype=torch.bool, device=dealt.device)
        self.register_buffer("_apart", apart, persistent=False)
        widths = inside.sum(1).double()
        self._uniform = float((2 * widths * (1 - 1 / widths.sqrt())).sum())
        self._soften(logits)

    def blocks(self) -> Tensor:
        """B as `[G, g, g]`, doubly stochastic. Differentiable."""
        return sinkhorn(self._masked(self._wide_logits()), self.iterations)

    def _masked(self, logits: Tensor) -> Tensor:
        apart = self._buffers["_apart"]
        assert apart is not None
        return logits.masked_fill(apart, -torch.inf)

    def relaxed(self) -> Tensor:
        whole = torch.block_diag(*self.blocks())[: self.size, : self.size]
        return whole[:, self.dealt.argsort()]

    def forward(self, x: Tensor) -> Tensor:
        if self.logits is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            blocks = self.blocks()
        number, width, _ = blocks.shape
        x = functional.pad(x[..., self.dealt], (0, number * width - self.size))
        y = torch.einsum("ghk,...gk->...gh", blocks.to(x.dtype), x.unflatten(-1, (number, width)))
        return y.flatten(-2)[..., : self.size]

    def penalty(self) -> Tensor:
        if self.logits is None:
            return torch.zeros((), device=self.index.device)
        blocks = self.blocks()
        l2 = blocks.norm(dim=1).sum() + blocks.norm(dim=2).sum()
        return (2 * blocks.sum() - l2) / self._uniform

    @torch.no_grad()
    def nearest(self) -> Tensor:
        if self.logits is None:
            return self.index.clone()
        width = self.logits.shape[1]
        found = [assign(block) + at * width for at, block in enumerate(self.blocks())]
        return self.dealt[torch.cat(found)[: self.size]]

    @torch.no_grad()
    def project_(self) -> None:
        if self.logits is not None:
            balanced = self._masked(self.logits).log_softmax(2).log_softmax(1)
            self.logits.copy_(balanced.nan_to_num(neginf=0.0))


@dataclass(kw_only=True, eq=False)
class Grouped(Relaxed):
    """Soft permutations within groups of features, dealt at random: d * g parameters, not d * d.

    Args:
        group: features of a group; a last one may have fewer.
        iterations: rounds of row and column normalisation.
        init: as in `initial_logits`.
        scale: as in `initial_logits`.
        side, lr, betas, weighting, weight, ramp_start, ramp_end, delta, deadline, interval, clip:
            as in `Relaxed`.
    """

    group: int
    iterations: int
    init: Init
    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require_start(self.iterations, self.init, self.scale)
        require(self.group >= 2, "permutation.group", self.group, "at least 2 features")

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        if size == 1:
            return single(generator)
        # Groups as equal as can be: a last one of a single feature could learn nothing.
        width = math.ceil(size / math.ceil(size / self.group))
        shape = (math.ceil(size / width), width, width)
        dealt = torch.randperm(size, generator=generator, device=generator.device)
        logits = initial_logits(shape, self.init, self.scale, generator)
        return GroupedPermutation(logits, dealt, iterations=self.iterations)
