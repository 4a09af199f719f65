"""Choices that are soft first and hard for good: permutations of features, selections of units.

Both share one life. While soft, a choice is a differentiable matrix or vector given by `logits`,
and a learner trains it; once it is sharp enough, or late enough, it hardens: the nearest hard
choice takes its place and the logits are dropped.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from padst_exp.errors import require

Readiness = Literal["delta", "deadline"] | None


class Soft(nn.Module, abc.ABC):
    """One choice, soft or hard already.

    Attributes:
        logits: what a learner trains, float32 or wider; None once hard.
        on_change: called, without arguments, after the choice hardened or was loaded.
        copied: names of buffers that count as much as the logits, such as a temperature; an
            average of models copies them.
    """

    logits: nn.Parameter | None
    copied: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.on_change: list[Callable[[], None]] = []

    @property
    def soft(self) -> bool:
        """Whether there is still something to learn."""
        return self.logits is not None

    @abc.abstractmethod
    def penalty(self) -> Tensor:
        """The distance to a hard choice, a differentiable scalar: 1 at uniform, 0 once hard."""

    @abc.abstractmethod
    def gain(self) -> Tensor:
        """How much of the norm of its input the soft choice leaves, a scalar; 1 once hard."""

    @abc.abstractmethod
    def nearest(self) -> Tensor:
        """The hard choice next to the soft one, as `harden` takes it, int64."""

    @abc.abstractmethod
    def harden(self, choice: Tensor | None = None) -> None:
        """Become hard for good and drop the logits.

        Args:
            choice: the hard choice to adopt; by default the nearest one.
        """

    def project_(self) -> None:
        """Bring `logits` back to where they belong, after an optimizer step."""

    def changed(self) -> None:
        """Tell whoever derives something from this choice that it is another one now."""
        for tell in self.on_change:
            tell()


def choices(model: nn.Module) -> dict[str, Soft]:
    """Every choice of `model`, soft or hard, by its module name, shared ones once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Soft)}


def soft_choices(model: nn.Module) -> dict[str, Soft]:
    """Those of them that are still soft."""
    return {name: choice for name, choice in choices(model).items() if choice.soft}


class Learner:
    """Trains the choices of one kind until they are hard; by itself it has none to train.

    A learner owns the optimizer of their logits, the interval at which it looks whether they are
    ready to harden, and the state of both in a checkpoint.

    Attributes:
        kind: the class of the choices it trains.
        section: of the configuration, that its keys belong to.
        interval: optimizer steps between two looks.
        choices: those that are soft still, by name.
        released: how many hardened so far.
    """

    kind: type[Soft]
    section: str = "permutation"

    def __init__(self, *, interval: int = 1) -> None:
        require(interval >= 1, f"{self.section}.interval", interval, "at least 1 step")
        self.interval = interval
        self.choices: dict[str, Soft] = {}
        self.released = 0
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def half_hard(self) -> bool:
        """Whether some of the choices hardened and others did not."""
        return self.released > 0 and len(self.choices) > 0

    def start(self, choices: Mapping[str, Soft]) -> None:
        """Take over `choices`, by name: those that are soft still are trained from now on."""
        self.released = 0
        self.choices = {name: choice for name, choice in choices.items() if choice.soft}
        logits = [choice.logits for choice in self.choices.values() if choice.logits is not None]
        self._optimizer = self.optimizer(logits) if logits else None

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer | None:
        """Return the optimizer of the logits; None if `step` does without one."""
        raise AssertionError(f"{type(self).__name__} has nothing to train")

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for choice in self.choices.values():
            if choice.logits is not None:
                choice.logits.grad = None

    def step(self, progress: float) -> None:
        """Take one optimizer step; ranks must have averaged the gradients before.

        Args:
            progress: completed steps over all steps of the training, in 0 .. 1.
        """
        if self._optimizer is None:
            return
        self.regularize(progress)
        self._optimizer.step()
        for choice in self.choices.values():
            choice.project_()

    def regularize(self, progress: float) -> None:
        """Add the gradient of the penalty to that of the task."""

    def regularize_weights(self) -> None:
        """Add to the gradients of what choices are about, before clipping and the step."""

    def ready(self, choice: Soft, progress: float) -> Readiness:
        """Return why a soft choice should harden now: sharp enough, forced; None: not yet."""
        return None

    def release(self, name: str, logits: nn.Parameter | None) -> None:
        """Let go of a choice that hardened, whose logits were these."""
        del self.choices[name]
        self.released += 1
        if logits is None or self._optimizer is None:
            return
        self._optimizer.state.pop(logits, None)
        for group in self._optimizer.param_groups:
            group["params"] = [other for other in group["params"] if other is not logits]
        groups = self._optimizer.param_groups
        groups[:] = [group for group in groups if group["params"]]
        if not groups:
            self._optimizer = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; the logits themselves are in the model."""
        optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        return {"optimizer": optimizer, "released": self.released}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it, after `start` with the choices that were soft then.

        Raises:
            ValueError: it is the state of other choices.
        """
        if (state["optimizer"] is None) != (self._optimizer is None):
            raise ValueError("another number of soft choices")
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        self.released = state["released"]
