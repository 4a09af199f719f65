"""Dynamic sparse training in transformers' own `Trainer`, as a callback.

algorithm = DropGrow(drop=Magnitude(), grow=Gradient(), counts=Constant(), moments="zero", ...)
sparsify(model, rules, structure=..., density=0.1, learner=learner, algorithm=algorithm)
Trainer(model, arguments, callbacks=[SparseTraining(algorithm=algorithm, learner=learner)], ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from padst_exp.atomic import replacing
from padst_exp.dst import Algorithm
from padst_exp.engine import changes, exchanges
from padst_exp.engine.adamw import AgeAwareAdamW
from padst_exp.engine.distributed import World
from padst_exp.engine.placement import Placement
from padst_exp.engine.step import looking_at, require_finite
from padst_exp.engine.tracker import Births, TopologyTracker
from padst_exp.errors import require
from padst_exp.files import reading
from padst_exp.layers import SparseWeight, sparse_weights
from padst_exp.permutations import NoPermutation, Permutation, PermutationLearner
from padst_exp.soft import Learner, choices, soft_choices

STATE = "padst_state.pt"


class SparseTraining(TrainerCallback):
    """Changes topologies and hardens permutations of a sparsified model while a `Trainer` trains.

    It does what `padst_exp.engine.step.Stepper` does, but that what is added to gradients of
    weights under soft selections is added after clipping. An algorithm with `moments="age"` wants
    `Trainer(optimizer_cls_and_kwargs=(AgeAwareAdamW, {"lr": ...}))`, of `engine.adamw`.

    Each checkpoint folder gets a `padst_state.pt`; to resume, the folder is in the output folder,
    or `TrainingArguments(resume_from_checkpoint=...)` names it.

    Args:
        algorithm: as given to `sparsify`.
        learner: as given to `sparsify`; None for none.
        seed: of growth.

    Attributes:
        model, optimizer: in training; the optimizer has no logits of soft choices.
        step: completed steps; `total_steps` of the whole training.
        tracker: counts changes.
        births: when each active unit was grown; None where the algorithm does not ask.
        average: None; there is no moving average.

    Raises:
        UserError: from `Trainer` and its `train`, for what a callback cannot do: several
            processes, float16 (whose steps may be skipped), a compiled or a dense model.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tracker: TopologyTracker
    births: Births | None
    average = None

    def __init__(
        self, *, algorithm: Algorithm, learner: PermutationLearner | None = None, seed: int = 0
    ) -> None:
        self.algorithm = algorithm
        self.learner = NoPermutation() if learner is None else learner
        selections = algorithm.selection_learner
        self.learners: list[Learner] = [
            self.learner,
            *([] if selections is None else [selections]),
        ]
        self.seed = seed
        self.world = World()
        self.placement = Placement(self.world)
        self.step = self.total_steps = 0
        self._changing: list[SparseWeight] = []
        self._collecting: list[SparseWeight] = []
        self._due: Mapping[str, Permutation] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        require(bool(sparse_weights(model)), "model", "a dense one", "one after sparsify")
        for key, value, wanted in (
            ("world_size", args.world_size, 1),
            ("n_gpu", max(args.n_gpu, 1), 1),
            ("fp16", args.fp16, False),
            ("torch_compile", args.torch_compile, False),
        ):
            require(value == wanted, f"TrainingArguments.{key}", value, str(wanted))
        # Trainer makes its optimizer of what requires a gradient; a learner has its own.
        for choice in soft_choices(model).values():
            assert choice.logits is not None
            choice.logits.requires_grad_(False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        grows = type(self.algorithm).drop_fraction is not Algorithm.drop_fraction
        aged = grows and self.algorithm.moments == "age"
        require(
            not aged or isinstance(self.optimizer, AgeAwareAdamW),
            "dst.moments",
            f"age with {type(self.optimizer).__name__}",
            "zero, or age with AgeAwareAdamW as optimizer_cls_and_kwargs of Trainer",
        )
        self.step, self.total_steps = state.global_step, state.max_steps
        self.world = World(device=args.device)
        self.placement = Placement(self.world)
        weights = sparse_weights(self.model)
        self.tracker = TopologyTracker(weights)
        self.births = Births(weights) if "age" in self.algorithm.needs else None
        for choice in soft_choices(self.model).values():
            assert choice.logits is not None
            choice.logits.requires_grad_(True)
            choice.logits.register_post_accumulate_grad_hook(self._put_aside)
        found = choices(self.model)
        for learner in self.learners:
            learner.start({n: c for n, c in found.items() if isinstance(c, learner.kind)})
        if self.step:
            self._restore(args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = self.step + 1
        self._changing = changes.changing(self, self.model, step)
        self._due = self.learner.exchanges(step, self.total_steps, rewiring=bool(self._changing))
        self._collecting = exchanges.collecting(self, self, self._changing, self._due)
        self._gradients = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        exchanges.stop_collecting(self._collecting)
        for logits, gradient in self._gradients.items():
            logits.grad = gradient
        exchanges.keep_gradients(self, self._changing)
        for learner in self.learners:
            learner.regularize_weights()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for learner in self.learners:
            learner.step((self.step + 1) / self.total_steps)
            learner.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step
        looking = looking_at(self.learners, self.step, self.total_steps)
        require_finite(self, self._changing, self._due, looking)
        if self._changing:
            changes.update_topologies(self, self, self._changing)
        if self._due:
            exchanges.exchange(self, self, self._due)
        if looking:
            # A callback has no batch to compute the loss of.
            changes.harden(self, self, looking, lambda: float("nan"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        payload = {
            "step": self.step,
            "digest": changes.topology_digest(self.model),
            "learners": [learner.state_dict() for learner in self.learners],
            "topology": self.tracker.state_dict(),
            "births": None if self.births is None else self.births.state_dict(),
        }
        with replacing(Path(args.output_dir) / f"checkpoint-{self.step}" / STATE) as file:
            torch.save(payload, file)

    def _put_aside(self, logits: nn.Parameter) -> None:
        """Keep a gradient from the clipping of those that are Trainer's."""
        gradient = logits.grad
        assert gradient is not None
        before = self._gradients.get(logits)
        self._gradients[logits] = gradient if before is None else before + gradient
        logits.grad = None

    def _restore(self, args: Any) -> None:
        named = args.resume_from_checkpoint
        own = Path(args.output_dir) / f"checkpoint-{self.step}"
        path = (Path(named) if isinstance(named, str) else own) / STATE
        with reading("TrainingArguments.resume_from_checkpoint", path, f"a {STATE} of this model"):
            saved = torch.load(path, map_location=self.world.device, weights_only=True)
            if saved["step"] != self.step:
                raise ValueError(f"it is of step {saved['step']}, not of {self.step}")
            if saved["digest"] != changes.topology_digest(self.model):
                raise ValueError("it is of other topologies than the model beside it")
            for learner, state in zip(self.learners, saved["learners"], strict=True):
                learner.load_state_dict(state)
            self.tracker.load_state_dict(saved["topology"])
            if self.births is not None:
                self.births.load_state_dict(saved["births"])
