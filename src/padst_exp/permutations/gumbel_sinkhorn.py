"""Gumbel-Sinkhorn: permutations drawn softly, ever more sharply (Mena et al. 2018)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from padst_exp.errors import require
from padst_exp.permutations.learners import (
    Init,
    PermutationLearner,
    Side,
    initial_logits,
    require_adam,
    require_end,
    require_start,
    single,
)
from padst_exp.permutations.permutation import Permutation
from padst_exp.permutations.sinkhorn import sinkhorn
from padst_exp.soft import Readiness, Soft


class DrawnPermutation(Permutation):
    """While training, M = Sinkhorn((logits + noise) / temperature), else without the noise.

    Gumbel's noise, drawn anew for every step; all ranks draw the same.

    Args:
        logits: `[d, d]`.
        seed: of the noise.
        noise: what it is multiplied by.
        iterations: rounds of Sinkhorn.

    Attributes:
        temperature: a scalar tensor; the lower, the sharper.
        draws: int64 scalar tensor, how often noise was drawn; with the seed it tells the noise.
        drawn: `[d, d]`, the noise of now.
    """

    copied = ("temperature",)
    temperature: Tensor
    draws: Tensor
    drawn: Tensor

    def __init__(self, logits: Tensor, seed: int, *, noise: float, iterations: int) -> None:
        super().__init__(torch.arange(len(logits), device=logits.device), iterations=iterations)
        self.seed = seed
        self.noise = noise
        self.register_buffer("temperature", logits.new_ones(()))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=logits.device))
        self.register_buffer("drawn", torch.zeros_like(logits), persistent=False)
        self._soften(logits)
        self.draw()

    def matrix(self) -> Tensor:
        if self.logits is None or not self.training:
            return super().matrix()
        with torch.autocast(self.logits.device.type, enabled=False):
            return self._sharpened(self._wide_logits() + self.noise * self.drawn)

    def relaxed(self) -> Tensor:
        return self._sharpened(self._wide_logits())

    def _sharpened(self, logits: Tensor) -> Tensor:
        return sinkhorn(logits / self.temperature, self.iterations)

    @torch.no_grad()
    def project_(self) -> None:
        if self.logits is not None:
            balanced = (self.logits / self.temperature).log_softmax(1).log_softmax(0)
            self.logits.copy_(self.temperature * balanced)

    def draw(self) -> None:
        """Draw other noise."""
        self.draws += 1
        self._redraw()

    @torch.no_grad()
    def _redraw(self) -> None:
        generator = torch.Generator(self.drawn.device).manual_seed(self.seed + int(self.draws))
        tiny = torch.finfo(self.drawn.dtype).tiny
        self.drawn.uniform_(generator=generator).clamp_min_(tiny).log_().neg_()
        self.drawn.clamp_min_(tiny).log_().neg_()

    def harden(self, choice: Tensor | None = None) -> None:
        super().harden(choice)
        self.register_buffer("drawn", torch.empty(0), persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.soft:
            self._redraw()


class GumbelSinkhorn(PermutationLearner):
    """Soft permutations under noise, whose temperature falls until they are hard (Mena 2018).

    There is no penalty: the temperature falls geometrically from `temperature` to
    `final_temperature` at the deadline.

    Args:
        side: as in `PermutationLearner`.
        iterations: rounds of row and column normalisation.
        init: as in `initial_logits`.
        scale: as in `initial_logits`.
        noise: factor of the noise; 0: none.
        temperature: at the beginning.
        final_temperature: at the deadline.
        lr: learning rate of Adam, constant.
        betas: of Adam.
        delta: penalty (without noise) under which a permutation hardens.
        deadline: fraction of training at which it hardens in any case.
        interval: optimizer steps between two looks whether a permutation is ready.
    """

    def __init__(
        self,
        *,
        side: Side,
        iterations: int,
        init: Init,
        scale: float,
        noise: float,
        temperature: float,
        final_temperature: float,
        lr: float,
        betas: tuple[float, float],
        delta: float,
        deadline: float,
        interval: int,
    ) -> None:
        super().__init__(side=side, interval=interval)
        require_start(iterations, init, scale)
        require_adam(lr, betas)
        require_end(delta, deadline)
        require(noise >= 0, "permutation.noise", noise, "at least 0")
        require(
            final_temperature > 0, "permutation.final_temperature", final_temperature, "positive"
        )
        require(
            temperature >= final_temperature,
            "permutation.temperature",
            temperature,
            f"at least permutation.final_temperature={final_temperature}",
        )
        self.iterations = iterations
        self.init: Init = init
        self.scale = scale
        self.noise = noise
        self.temperature = temperature
        self.final_temperature = final_temperature
        self.lr = lr
        self.betas = betas
        self.delta = delta
        self.deadline = deadline

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        if size == 1:
            return single(generator)
        logits = initial_logits((size, size), self.init, self.scale, generator)
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        made = DrawnPermutation(logits, seed, noise=self.noise, iterations=self.iterations)
        made.temperature.fill_(self.temperature)
        return made

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        super().step(progress)
        left = max(0.0, 1 - progress / self.deadline)
        temperature = self.final_temperature * (self.temperature / self.final_temperature) ** left
        for choice in self.choices.values():
            assert isinstance(choice, DrawnPermutation)
            choice.temperature.fill_(temperature)
            choice.draw()

    @torch.no_grad()
    def ready(self, choice: Soft, progress: float) -> Readiness:
        if float(choice.penalty()) < self.delta:
            return "delta"
        return "deadline" if progress >= self.deadline else None
