"""What a learned permutation is compared with: the same soft phase, without what was learned."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_exp.permutations.learners import DoublyStochastic
from padst_exp.permutations.permutation import Permutation


class DrawnTarget(Permutation):
    """A relaxed permutation with another one beside it that chance has drawn.

    Args:
        logits, projected, iterations: as in `Permutation`.
        drawn: `[d]`, int64, the other one. It follows from the seed of the run, and is not saved.
    """

    drawn: Tensor

    def __init__(self, logits: Tensor, drawn: Tensor, *, projected: bool, iterations: int) -> None:
        super().__init__(
            torch.arange(len(logits), device=logits.device),
            projected=projected,
            iterations=iterations,
        )
        self.register_buffer("drawn", drawn, persistent=False)
        self._soften(logits)

    def distance(self) -> Tensor:
        """Return the squared distance to the drawn permutation: a regression on white inputs."""
        matrix = self.relaxed()
        drawn = torch.eye(self.size, dtype=matrix.dtype, device=matrix.device)[self.drawn]
        return (matrix - drawn).square().sum()


class ShuffledPermutation(DrawnTarget):
    """Hardens to the nearest permutation with its features shuffled: to one drawn at random."""

    @torch.no_grad()
    def nearest(self) -> Tensor:
        nearest = super().nearest()
        return nearest[self.drawn] if self.soft else nearest


class Placebo(DoublyStochastic):
    """Doubly stochastic matrices, each with a permutation beside it that is drawn from the seed."""

    creates = DrawnTarget

    def soften(self, logits: Tensor, generator: torch.Generator) -> Permutation:
        drawn = torch.randperm(len(logits), generator=generator, device=generator.device)
        return self.creates(logits, drawn, projected=self.projected, iterations=self.iterations)


class RandomTarget(Placebo):
    """Learned as `DoublyStochastic`, but towards a random permutation instead of for the task.

    Its gain over a fixed random permutation is that of the soft phase alone.
    """

    def regularize(self, progress: float) -> None:
        for permutation in self.choices.values():
            assert isinstance(permutation, DrawnTarget) and permutation.logits is not None
            (permutation.logits.grad,) = torch.autograd.grad(
                permutation.distance(), permutation.logits
            )
        super().regularize(progress)


class Shuffled(Placebo):
    """Learned as `DoublyStochastic`, then replaced by a random permutation where it hardens.

    What a learned one gains over it is in the permutation itself, not in how it came about.
    """

    creates = ShuffledPermutation
