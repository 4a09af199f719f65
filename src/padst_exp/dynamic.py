"""Dynamic sparse training in a loop of your own: the optimizer's steps do what there is to do.

algorithm, learner = option("dst/rigl"), option("permutation/doubly_stochastic")
sparsify(model, rules, structure=..., density=0.1, algorithm=algorithm, learner=learner)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
DynamicSparsity(model, optimizer, algorithm=algorithm, learner=learner, total_steps=10_000)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from padst_exp.dst import Algorithm
from padst_exp.engine import changes, exchanges
from padst_exp.engine.adamw import AgeAwareAdamW
from padst_exp.engine.distributed import World
from padst_exp.engine.placement import Placement
from padst_exp.engine.step import looking_at, require_finite
from padst_exp.engine.tracker import Births, TopologyTracker
from padst_exp.errors import UserError, require
from padst_exp.layers import SparseWeight, sparse_weights
from padst_exp.permutations import NoPermutation, PermutationLearner
from padst_exp.soft import Learner, choices, soft_choices

# Where an optimizer has what changes topologies in its steps: one, be a notebook's cell run twice.
_OWNER = "_dynamic_sparsity"


class DynamicSparsity:
    """Lets topologies change and permutations harden whenever `optimizer` takes a step.

    It does what `padst_exp.engine.step.Stepper` does, but that what is added to gradients of
    weights under soft selections is added after clipping. All of it is part of
    `optimizer.step()`, behind as many backward passes as you like. Logits of soft
    permutations have an optimizer of their own and are taken out of yours.

    To resume, load the model's state before this object is made, the optimizer's and its own
    after.

    Args:
        model: after `sparsify`, on its device.
        optimizer: of all its values, made after `sparsify`. Its state moves along. Another object
            like this one on it is removed.
        algorithm: as given to `sparsify`.
        learner: as given to `sparsify`; None for none.
        total_steps: optimizer steps of the whole training, of which schedules take shares.
        step: completed steps.
        seed: of growth.

    Attributes:
        step: completed steps.
        tracker: counts changes.
        births: when each active unit was grown; None where the algorithm does not ask.
        average: None; there is no moving average.

    Raises:
        UserError: a dense model, an optimizer without its values or, for `moments="age"`, one that
            counts no ages; several processes.
    """

    average = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        algorithm: Algorithm,
        learner: PermutationLearner | None = None,
        total_steps: int,
        step: int = 0,
        seed: int = 0,
    ) -> None:
        former = vars(optimizer).get(_OWNER)
        if former is not None:
            former.remove()
        self.model, self.optimizer = model, optimizer
        self.algorithm = algorithm
        self.learner = NoPermutation() if learner is None else learner
        selections = algorithm.selection_learner
        self.learners: list[Learner] = [
            self.learner,
            *([] if selections is None else [selections]),
        ]
        self.total_steps, self.step, self.seed = total_steps, step, seed
        weights = sparse_weights(model)
        self._require_fit(weights)
        self.world = World(device=next(model.parameters()).device)
        self.placement = Placement(self.world)
        self.tracker = TopologyTracker(weights)
        self.births = Births(weights) if "age" in algorithm.needs else None
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._removed = False
        self._take_logits()
        found = choices(model)
        for each in self.learners:
            each.start({n: c for n, c in found.items() if isinstance(c, each.kind)})
        self._wrap_step()
        setattr(optimizer, _OWNER, self)
        self._ask()

    def remove(self) -> None:
        """Let steps of the optimizer be nothing but steps again; topologies stay as they are."""
        self._removed = True
        exchanges.stop_collecting(self._collecting)
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the states of model and optimizer."""
        return {
            "step": self.step,
            "digest": changes.topology_digest(self.model),
            "learners": [learner.state_dict() for learner in self.learners],
            "topology": self.tracker.state_dict(),
            "births": None if self.births is None else self.births.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it, for a model whose state was loaded before this object was made.

        Raises:
            ValueError: it is the state of another model.
        """
        if state["digest"] != changes.topology_digest(self.model):
            raise ValueError("it is of other topologies than the model beside it")
        for learner, own in zip(self.learners, state["learners"], strict=True):
            learner.load_state_dict(own)
        self.tracker.load_state_dict(state["topology"])
        if self.births is not None:
            self.births.load_state_dict(state["births"])
        self.step = state["step"]
        self._ask()

    def _require_fit(self, weights: Mapping[str, SparseWeight]) -> None:
        require(bool(weights), "model", "a dense one", "one after sparsify")
        processes = torch.distributed.is_available() and torch.distributed.is_initialized()
        size = torch.distributed.get_world_size() if processes else 1
        require(size == 1, "DynamicSparsity", f"{size} processes", "one process")
        require(self.total_steps >= 1, "total_steps", self.total_steps, "at least 1 step")
        known = {p for group in self.optimizer.param_groups for p in group["params"]}
        for name, weight in weights.items():
            if not weight.frozen and weight.values not in known:
                raise UserError(
                    f"optimizer: it has no {name}.values; make it after sparsify, of "
                    "model.parameters()"
                )
        grows = type(self.algorithm).drop_fraction is not Algorithm.drop_fraction
        require(
            not (grows and self.algorithm.moments == "age")
            or isinstance(self.optimizer, AgeAwareAdamW),
            "dst.moments",
            f"age with {type(self.optimizer).__name__}",
            "zero, or age with padst_exp.engine.adamw.AgeAwareAdamW",
        )

    def _take_logits(self) -> None:
        """Only learners train logits; the optimizer, and who clips, see nothing of them."""
        logits = {choice.logits for choice in soft_choices(self.model).values()}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in logits]
        for each in logits:
            assert each is not None
            each.requires_grad_(True)
            self._hooks.append(each.register_post_accumulate_grad_hook(self._put_aside))

    def _put_aside(self, logits: nn.Parameter) -> None:
        gradient = logits.grad
        assert gradient is not None
        before = self._gradients.get(logits)
        self._gradients[logits] = gradient if before is None else before + gradient
        logits.grad = None

    def _ask(self) -> None:
        """Let the backward passes before the next step keep what that step needs."""
        step = self.step + 1
        self._changing = changes.changing(self, self.model, step)
        self._due = self.learner.exchanges(step, self.total_steps, rewiring=bool(self._changing))
        self._collecting = exchanges.collecting(self, self, self._changing, self._due)
        self._gradients = {}

    def _wrap_step(self) -> None:
        """As schedulers of learning rates do: hooks of a step also run for that of a superclass."""
        step = self.optimizer.step

        @wraps(step)
        def wrapped(optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
            if self._removed:
                return step(closure)
            wanted = "backward passes before its step"
            require(closure is None, "optimizer", "a closure", wanted)
            self._before_step()
            step()
            self._after_step()

        self.optimizer.step = MethodType(wrapped, self.optimizer)  # type: ignore[method-assign]

    def _before_step(self) -> None:
        exchanges.stop_collecting(self._collecting)
        for logits, gradient in self._gradients.items():
            logits.grad = gradient
        exchanges.keep_gradients(self, self._changing)
        for learner in self.learners:
            learner.regularize_weights()

    def _after_step(self) -> None:
        self.step += 1
        for learner in self.learners:
            learner.step(self.step / self.total_steps)
            learner.zero_grad()
        looking = looking_at(self.learners, self.step, self.total_steps)
        require_finite(self, self._changing, self._due, looking)
        if self._changing:
            changes.update_topologies(self, self, self._changing)
        if self._due:
            exchanges.exchange(self, self, self._due)
        if looking:
            # There is no batch here to compute the loss of.
            changes.harden(self, self, looking, lambda: float("nan"))
        self._ask()
