"""Permutation learners: what the permutations of a model start as and how they are trained."""

import abc
import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from padst_exp.errors import require
from padst_exp.permutations.exchange import Evidence, Exchange
from padst_exp.permutations.permutation import Permutation
from padst_exp.permutations.site import Site
from padst_exp.soft import Learner, Readiness, Soft

Side = Literal["in", "out", "both", "auto"]
Init = Literal["lognormal", "noise", "width"]


class PermutationLearner(Learner):
    """What all permutation learners share. By itself it has no soft phase.

    Attributes:
        side: which side of a sparse weight S is permuted: y = S P x ("in"), y = P S x ("out"),
            both, or what suits the structure ("auto").
        parts: of how many parts of a step's samples `exchange` wants gradients; 0: of none.
        spends_drops: whether entries that an exchange loses count as dropped, so that the next
            update of the topology drops so many fewer.
        moves_masks: whether its permutations are of the kind `Partition`, so that weights start
            dense under masks that it moves.
    """

    kind = Permutation
    parts = 0
    spends_drops = False
    moves_masks = False

    def __init__(self, *, side: Side, interval: int = 1) -> None:
        super().__init__(interval=interval)
        sides = ("in", "out", "both", "auto")
        require(side in sides, "permutation.side", side, "in, out, both or auto")
        self.side = side

    @abc.abstractmethod
    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        """Return a fresh permutation of `size` features drawn from `generator`, or None."""

    def fit(self, site: Site, generator: torch.Generator) -> Permutation | None:
        """Return the permutation of `site`, or None: slot i of S holds feature index[i] of W."""
        return self.create(site.size, generator)

    def exchanges(self, step: int, total: int, *, rewiring: bool) -> Mapping[str, Permutation]:
        """Return the permutations that may be exchanged after `step` of `total`, by name.

        Args:
            step: optimizer steps that are completed then.
            total: optimizer steps of the training.
            rewiring: whether topologies change after the same step, just before.
        """
        return {}

    def exchange(self, permutation: Permutation, evidence: Evidence | None) -> Exchange | None:
        """Return what is to take the place of one of `exchanges`; None: it stays.

        Args:
            permutation: as it is.
            evidence: of the weights that it acts on, if `parts` asks for it.
        """
        raise AssertionError(f"{type(self).__name__} exchanges nothing")


class NoPermutation(PermutationLearner):
    """No permutation at all: y = S x + b."""

    def __init__(self) -> None:
        super().__init__(side="auto")

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        return None


class RandomPermutation(PermutationLearner):
    """A fixed random permutation: what a learned one has to beat.

    Args:
        side: as in `PermutationLearner`.
    """

    def __init__(self, *, side: Side) -> None:
        super().__init__(side=side)

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        index = torch.randperm(size, generator=generator, device=generator.device)
        return Permutation(index)


class Relaxed(PermutationLearner):
    """Trains relaxed permutations by Adam, and sharpens them until they round safely.

    The weight of the penalty grows linearly from 0 to `weight` between the fractions `ramp_start`
    and `ramp_end` of training. Adaptive, with c the ramped weight: g = g_task + c * |T g_task| /
    |T g_pen| * g_pen per permutation, where T is `Permutation.tangent`. Fixed: g = g_task
    + c * g_pen.

    Args:
        side: as in `PermutationLearner`.
        lr: learning rate of Adam, constant.
        betas: of Adam.
        weighting: "adaptive" or "fixed", above.
        weight: final weight of the penalty.
        ramp_start: fraction of training.
        ramp_end: fraction of training.
        delta: penalty under which a permutation hardens.
        deadline: fraction of training at which it hardens in any case.
        interval: optimizer steps between two looks whether a permutation is ready.
        clip: maximal norm of each permutation's gradient, penalty included; None: no clipping.
    """

    def __init__(
        self,
        *,
        side: Side,
        lr: float,
        betas: tuple[float, float],
        weighting: Literal["adaptive", "fixed"],
        weight: float,
        ramp_start: float,
        ramp_end: float,
        delta: float,
        deadline: float,
        interval: int,
        clip: float | None,
    ) -> None:
        super().__init__(side=side, interval=interval)
        require_adam(lr, betas)
        require_end(delta, deadline)
        _require(weight >= 0, "weight", weight, "at least 0")
        _require(0 <= ramp_start <= 1, "ramp_start", ramp_start, "a fraction of training, 0 .. 1")
        _require(
            ramp_start <= ramp_end <= 1,
            "ramp_end",
            ramp_end,
            f"a fraction of training from ramp_start={ramp_start} to 1",
        )
        _require(clip is None or clip > 0, "clip", clip, "positive, or null for none")
        self.lr = lr
        self.betas = (float(betas[0]), float(betas[1]))
        self.adaptive = weighting == "adaptive"
        self.weight = weight
        self.ramp_start = ramp_start
        self.ramp_end = ramp_end
        self.delta = delta
        self.deadline = deadline
        self.clip = clip

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas)

    def regularize(self, progress: float) -> None:
        weight = self.weight * self._ramp(progress)
        for permutation in self.choices.values():
            assert isinstance(permutation, Permutation)
            logits = permutation.logits
            assert logits is not None
            if weight > 0:
                (penalty,) = torch.autograd.grad(permutation.penalty(), logits)
                if logits.grad is None:
                    logits.grad = torch.zeros_like(logits)
                scale = _balance(permutation, logits.grad, penalty) if self.adaptive else 1
                logits.grad.add_(penalty * (weight * scale))
            if self.clip is not None:
                nn.utils.clip_grad_norm_(logits, self.clip)

    @torch.no_grad()
    def ready(self, choice: Soft, progress: float) -> Readiness:
        if float(choice.penalty()) < self.delta:
            return "delta"
        return "deadline" if progress >= self.deadline else None

    def _ramp(self, progress: float) -> float:
        if progress >= self.ramp_end:
            return 1.0
        if progress <= self.ramp_start:
            return 0.0
        return (progress - self.ramp_start) / (self.ramp_end - self.ramp_start)


class DoublyStochastic(Relaxed):
    """Doubly stochastic matrices, sharpened by the l1-l2 penalty until they round safely (PA-DST).

    Args:
        parametrization: "logits" (through Sinkhorn) or "projected" (the paper's: entries clamped
            and normalised after each step).
        iterations: rounds of row and column normalisation.
        init: as in `initial_logits`.
        scale: as in `initial_logits`.
        keep: share of the identity in what it starts as over trained weights, which must survive
            it; the noise has the rest. From about 1 - delta on it hardens as the identity at once.
        side, lr, betas, weighting, weight, ramp_start, ramp_end, delta, deadline, interval, clip:
            as in `Relaxed`.
    """

    def __init__(
        self,
        *,
        side: Side,
        parametrization: Literal["logits", "projected"],
        iterations: int,
        init: Init,
        scale: float,
        keep: float,
        lr: float,
        betas: tuple[float, float],
        weighting: Literal["adaptive", "fixed"],
        weight: float,
        ramp_start: float,
        ramp_end: float,
        delta: float,
        deadline: float,
        interval: int,
        clip: float | None,
    ) -> None:
        super().__init__(
            side=side, lr=lr, betas=betas, weighting=weighting, weight=weight,
            ramp_start=ramp_start, ramp_end=ramp_end, delta=delta, deadline=deadline,
            interval=interval, clip=clip,
        )  # fmt: skip
        require_start(iterations, init, scale)
        _require(0.5 < keep < 1, "keep", keep, "a share above 0.5 and below 1")
        self.projected = parametrization == "projected"
        self.iterations = iterations
        self.init: Init = init
        self.scale = scale
        self.keep = keep

    def create(self, size: int, generator: torch.Generator) -> Permutation | None:
        if size == 1:
            return single(generator)
        logits = initial_logits((size, size), self.init, self.scale, generator)
        return self.soften(logits, generator)

    def fit(self, site: Site, generator: torch.Generator) -> Permutation | None:
        fresh = self.create(site.size, generator)
        if site.importance is None or fresh is None or not fresh.soft:
            return fresh
        # Its singular values are at least 2 keep - 1: trained weights can be read through it.
        noise = fresh.matrix().detach()
        identity = torch.eye(site.size, device=noise.device)
        return self.soften((self.keep * identity + (1 - self.keep) * noise).log(), generator)

    def soften(self, logits: Tensor, generator: torch.Generator) -> Permutation:
        """Return the soft permutation that begins with `logits` `[d, d]`, as of no projection."""
        return Permutation(
            logits.exp() if self.projected else logits,
            projected=self.projected,
            iterations=self.iterations,
        )


def single(generator: torch.Generator) -> Permutation:
    """The one permutation of one feature, which needs no learning."""
    return Permutation(torch.zeros(1, dtype=torch.int64, device=generator.device))


def initial_logits(
    shape: tuple[int, ...], init: Init, scale: float, generator: torch.Generator
) -> Tensor:
    """Return random logits of `shape`, of which the last two dimensions are a matrix `[d, d]`.

    Args:
        shape: of the logits.
        init: "lognormal": scale * randn. "noise": log(1 + scale * randn), near uniform. "width":
            sqrt(ln(1 + scale^2 d)) * randn, whose matrix leaves about `scale` of the norm of its
            input at every width d; the gain of "lognormal" falls as 1 / sqrt(d).
        scale: of the noise; for "width", the gain.
        generator: of the noise, on its device.
    """
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if init == "width":
        return noise * math.sqrt(math.log1p(scale**2 * shape[-1]))
    noise = noise * scale
    return noise if init == "lognormal" else noise.add(1).clamp_min(1e-3).log()


def require_start(iterations: int, init: str, scale: float) -> None:
    """Refuse settings of `initial_logits` and Sinkhorn that make no sense."""
    # Each is a step of autograd; 3 to 30 end alike.
    _require(1 <= iterations <= 1000, "iterations", iterations, "from 1 to 1000")
    _require(init in get_args(Init), "init", init, "lognormal, noise or width")
    # Of exp(scale * randn), which must be finite.
    wanted = "positive (equal rows would never part), and at most 10"
    _require(0 < scale <= 10, "scale", scale, wanted)
    _require(
        init != "width" or scale < 1, "scale", scale, "a gain below 1 with permutation.init=width"
    )


def require_adam(lr: float, betas: tuple[float, float]) -> None:
    """Refuse settings of Adam that make no sense."""
    _require(lr > 0, "lr", lr, "positive")
    valid = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    _require(valid, "betas", betas, "two numbers of at least 0 and below 1")


def require_end(delta: float, deadline: float) -> None:
    """Refuse ends of a soft phase that make no sense."""
    _require(0 < delta < 1, "delta", delta, "between 0 (a permutation) and 1 (uniform)")
    _require(0 < deadline <= 1, "deadline", deadline, "a fraction of training in (0, 1]")


def require_span(start: float, deadline: float) -> None:
    """Refuse fractions of training that make no span."""
    _require(0 <= start < 1, "start", start, "a fraction of training in [0, 1)")
    wanted = f"a fraction of training after permutation.start={start}"
    _require(start < deadline <= 1, "deadline", deadline, wanted)


def _require(valid: bool, key: str, value: object, wanted: str) -> None:
    require(valid, f"permutation.{key}", value, wanted)


def _balance(permutation: Permutation, task: Tensor, penalty: Tensor) -> Tensor:
    """Return |T task| / |T penalty|, or 1 where either is zero.

    A matrix without any task gradient (it feeds dead weights only) must still harden, and then
    the scale is of no matter to Adam.
    """
    ratio = permutation.tangent(task).norm() / permutation.tangent(penalty).norm()
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1)
