"""Dynamic sparse training in transformers' own `Trainer`, as a callback.

algorithm = DropGrow(drop=Magnitude(), grow=Gradient(), counts=Constant(), moments="zero", ...)
sparsify(model, rules, structure=..., density=0.1, learner=learner, algorithm=algorithm)
Trainer(model, arguments, callbacks=[SparseTraining(algorithm=algorithm, learner=learner)], ...)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from padst_exp.atomic import replacing
from padst_exp.dst import Algorithm
from padst_exp.dynamic import DynamicSparsity
from padst_exp.errors import require
from padst_exp.files import reading
from padst_exp.layers import sparse_weights
from padst_exp.permutations import PermutationLearner
from padst_exp.soft import soft_choices

STATE = "padst_state.pt"


class SparseTraining(TrainerCallback):
    """Changes topologies and hardens permutations of a sparsified model while a `Trainer` trains.

    `DynamicSparsity` does it, on the optimizer that `Trainer` makes. An algorithm with
    `moments="age"` wants `Trainer(optimizer_cls_and_kwargs=(AgeAwareAdamW, {"lr": ...}))`, of
    `engine.adamw`.

    Each checkpoint folder gets a `padst_state.pt`; to resume, the folder is in the output folder,
    or `TrainingArguments(resume_from_checkpoint=...)` names it.

    Args:
        algorithm: as given to `sparsify`.
        learner: as given to `sparsify`; None for none.
        seed: of growth.

    Attributes:
        dynamics: what changes the model in training, or did; None before.

    Raises:
        UserError: from `Trainer` and its `train`, for what a callback cannot do: several
            processes, float16 (whose steps may be skipped), a compiled or a dense model.
    """

    def __init__(
        self, *, algorithm: Algorithm, learner: PermutationLearner | None = None, seed: int = 0
    ) -> None:
        self.algorithm, self.learner, self.seed = algorithm, learner, seed
        self.dynamics: DynamicSparsity | None = None

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
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.dynamics = DynamicSparsity(
            model,
            getattr(optimizer, "optimizer", optimizer),
            algorithm=self.algorithm,
            learner=self.learner,
            total_steps=state.max_steps,
            step=state.global_step,
            seed=self.seed,
        )
        if state.global_step:
            self._restore(self.dynamics, args, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.dynamics is not None
        self.dynamics.remove()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.dynamics is not None
        with replacing(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE) as file:
            torch.save(self.dynamics.state_dict(), file)

    def _restore(self, dynamics: DynamicSparsity, args: Any, model: nn.Module) -> None:
        named, step = args.resume_from_checkpoint, dynamics.step
        own = Path(args.output_dir) / f"checkpoint-{step}"
        path = (Path(named) if isinstance(named, str) else own) / STATE
        with reading("TrainingArguments.resume_from_checkpoint", path, f"a {STATE} of this model"):
            device = next(model.parameters()).device
            saved = torch.load(path, map_location=device, weights_only=True)
            if saved["step"] != step:
                raise ValueError(f"it is of step {saved['step']}, not of {step}")
            dynamics.load_state_dict(saved)
