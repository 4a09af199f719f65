"""Straight-through: a hard permutation multiplies, a matrix collects what another would gain."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from padst_exp.errors import require
from padst_exp.permutations.exchange import Evidence, Exchange
from padst_exp.permutations.learners import PermutationLearner, Side, require_span, single
from padst_exp.permutations.permutation import Permutation, assign
from padst_exp.soft import Readiness, Soft


class HeldPermutation(Permutation):
    """Multiplies by a hard permutation that may still be exchanged; `logits` score all others.

    The gradient of `logits` is that of the matrix entries that multiply, straight through.

    Args:
        index: int64 `[d]`, the first one.

    Attributes:
        current: int64 `[d]`, the one that multiplies.
    """

    current: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__(index)
        self.register_buffer("current", index.clone())
        self._soften(torch.zeros(self.size, self.size, device=index.device))

    def forward(self, x: Tensor) -> Tensor:
        if self.logits is None:
            return x
        permuted: Tensor = _Gather.apply(x, self.current, self.logits)
        return permuted

    def relaxed(self) -> Tensor:
        scores = self._wide_logits()
        hard = torch.eye(self.size, dtype=scores.dtype, device=scores.device)[self.current]
        return hard + scores - scores.detach()

    def penalty(self) -> Tensor:
        # What multiplies is hard already.
        return torch.zeros((), device=self.index.device)

    @torch.no_grad()
    def nearest(self) -> Tensor:
        return (self.index if self.logits is None else self.current).clone()

    def project_(self) -> None:
        return

    def held(self) -> Tensor:
        return self.index if self.logits is None else self.current

    @torch.no_grad()
    def exchange(self, proposal: Exchange) -> None:
        if self.logits is None:
            super().exchange(proposal)
        else:
            self.current.copy_(proposal.index)


class _Gather(torch.autograd.Function):
    """x[..., index], with the gradient of the matrix that this multiplies by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(x, index)
        ctx.dtype = scores.dtype
        return x.index_select(-1, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x, index = ctx.saved_tensors
        grad_x = grad_scores = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.index_select(-1, index.argsort())
        if ctx.needs_input_grad[2]:
            rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
            grad_scores = rows.to(ctx.dtype).t() @ inputs.to(ctx.dtype)
        return grad_x, None, grad_scores


class StraightThrough(PermutationLearner):
    """Exchanges hard permutations for those that the gradients gathered so far speak for.

    The scores of all pairs of slot and feature are an exponential average of minus the gradient
    of the permutation matrix; every `interval` steps an assignment maximises their sum (STEAM,
    PermLLM). Values are carried along with their features.

    Args:
        side: as in `PermutationLearner`.
        memory: decay of the average, over steps.
        carry: whether values go with their features (PermLLM) or stay in their slots.
        start: fraction of training before which nothing is exchanged.
        deadline: fraction of training at which the permutations become final.
        interval: optimizer steps between two assignments.
    """

    def __init__(
        self,
        *,
        side: Side,
        memory: float,
        carry: bool,
        start: float,
        deadline: float,
        interval: int,
    ) -> None:
        super().__init__(side=side, interval=interval)
        require(0 <= memory < 1, "permutation.memory", memory, "at least 0 and below 1")
        require_span(start, deadline)
        self.memory = memory
        self.carry = carry
        self.begin = start
        self.deadline = deadline

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        if size == 1:
            return single(generator)
        return HeldPermutation(torch.randperm(size, generator=generator, device=generator.device))

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer | None:
        return None

    @torch.no_grad()
    def step(self, progress: float) -> None:
        for choice in self.choices.values():
            logits = choice.logits
            if logits is not None and logits.grad is not None:
                logits.lerp_(-logits.grad, 1 - self.memory)

    def exchanges(self, step: int, total: int, *, rewiring: bool) -> Mapping[str, Permutation]:
        due = step % self.interval == 0 and self.begin <= step / total < self.deadline
        return cast(Mapping[str, Permutation], self.choices) if due else {}

    @torch.no_grad()
    def exchange(self, permutation: Permutation, evidence: Evidence | None) -> Exchange | None:
        assert isinstance(permutation, HeldPermutation) and permutation.logits is not None
        index = assign(permutation.logits)
        same = torch.equal(index, permutation.current)
        return None if same else Exchange(index=index, carry=self.carry)

    def ready(self, choice: Soft, progress: float) -> Readiness:
        return "deadline" if progress >= self.deadline else None
