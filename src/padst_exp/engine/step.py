"""One optimizer step, and the changes of topology that follow it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from padst_exp.data.seeding import seed_of
from padst_exp.engine import changes
from padst_exp.engine.distributed import World
from padst_exp.engine.evaluation import forward_context, to_device
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.state import TrainingState
from padst_exp.layers import Move, SparseWeight, sparse_weights
from padst_exp.soft import Learner, choices, soft_choices

Batch = tuple[Tensor, Tensor]


class DivergedError(Exception):
    """The loss or a weight is not a finite number.

    Attributes:
        step: at which it was first seen.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} at step {step}")
        self.step = step


class Stepper:
    """Carries a `TrainingState` on by single steps.

    Args:
        experiment: what is trained and how.
        state: of the training.
        world: of this process.
        record: takes a kind of event and its values, for the metrics.
        say: takes a line for a person.

    Attributes:
        lr: learning rate of the last step.
    """

    def __init__(
        self,
        experiment: Experiment,
        state: TrainingState,
        *,
        world: World,
        record: Callable[[str, Mapping[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self.experiment, self.state, self.world = experiment, state, world
        self.task, self.trainer = experiment.task, experiment.trainer
        self.algorithm = experiment.algorithm
        self.total = experiment.total_steps
        self.record, self.say = record, say
        self.model = state.model
        if self.trainer.compile:
            compile_blocks(self.model)
        self._replicate()
        self.lr = 0.0
        self._pending: list[tuple[Tensor, Tensor | None]] = []

    def _replicate(self) -> None:
        """Take the parameters of the model as they are now: for ranks, and for clipping."""
        soft = [f"{name}.logits" for name in soft_choices(self.model)]
        # What was there before lets go of the parameters first.
        self.forward: nn.Module = self.model
        self.forward = self.world.replicate(self.model, soft)
        self.parameters = self.state.trained_parameters()

    @property
    def soft(self) -> bool:
        """Whether any choice is still soft."""
        return any(learner.choices for learner in self.state.learners)

    def step(self, batches: Iterator[Batch]) -> None:
        """Take as many micro-batches as one step needs and carry the state on.

        Nothing here waits for the device, but for steps that change topologies or harden.
        """
        state = self.state
        step, progress = state.step + 1, (state.step + 1) / self.total
        changing = self._changing(step)

        state.optimizer.zero_grad(set_to_none=True)
        for learner in state.learners:
            learner.zero_grad()
        loss, seen = self._accumulate(batches, changing)
        if self.soft:
            self._average_gradients()
        self._keep_gradients(changing)
        norm = None
        if self.trainer.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.trainer.clip_norm)
        self.lr = state.optimizer.param_groups[0]["lr"]
        state.optimizer.step()
        state.schedule.step_update(step)
        for learner in state.learners:
            learner.step(progress)
        if state.average is not None:
            state.average.update(step)
        state.step = step
        self._pending.append((loss, norm))
        hardening = [
            learner
            for learner in state.learners
            if learner.choices and (step % learner.interval == 0 or step == self.total)
        ]
        if changing or hardening:
            self.settle()  # nothing is chosen by a gradient that is not finite
        if changing:
            self._change(changing)
        if hardening:
            self._harden(hardening, seen, progress)

    def settle(self) -> None:
        """Fetch losses and norms from the device.

        Raises:
            DivergedError: when a loss is not finite.
        """
        if not self._pending:
            return
        losses = torch.stack([loss for loss, _ in self._pending])
        self.world.mean_([losses])
        first = self.state.step - len(self._pending) + 1
        for offset, loss in enumerate(losses.tolist()):
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss}", first + offset)
            self.state.losses.append(loss)
        norms = [norm for _, norm in self._pending if norm is not None]
        if norms:
            self.state.norms.extend(torch.stack(norms).tolist())
        self._pending = []

    @torch.no_grad()
    def soft_metrics(self) -> dict[str, dict[str, float]]:
        """Return penalty and gain of each choice that still is soft, by name."""
        soft = soft_choices(self.model)
        if not soft:
            return {}
        both = [torch.stack([c.penalty(), c.gain()]) for c in soft.values()]
        rows = dict(zip(soft, torch.stack(both).tolist(), strict=True))
        return {
            "penalty": {name: penalty for name, (penalty, _) in rows.items()},
            "gain": {name: gain for name, (_, gain) in rows.items()},
        }

    def _changing(self, step: int) -> list[SparseWeight]:
        """The weights whose topology is to be decided after `step`."""
        if not self.algorithm.is_due(step, self.total):
            return []
        return [
            weight
            for weight in sparse_weights(self.model).values()
            if weight.selection is None and self.algorithm.can_change(weight.topology())
        ]

    def _accumulate(
        self, batches: Iterator[Batch], changing: Sequence[SparseWeight]
    ) -> tuple[Tensor, list[Batch]]:
        """Forward and backward of all micro-batches; return the mean loss and the batches."""
        trainer, world = self.trainer, self.world
        collect = bool(changing) and "dense_gradient" in self.algorithm.needs
        for weight in changing:
            weight.collect_dense_gradient = collect
        # What is rare or passing is not worth another compilation of every block.
        losses, seen = [], []
        with eagerly(trainer.compile and (collect or self._half_hard())):
            for micro in range(trainer.micro_batches):
                part = world.rank * trainer.micro_batches + micro
                inputs, targets = to_device(next(batches), world.device, trainer.precision)
                inputs, targets = self.task.augment(
                    inputs, targets, seed_of("mix", self.experiment.seed, self.state.step, part)
                )
                with self._unsynchronised(micro + 1 < trainer.micro_batches):
                    with forward_context(trainer.precision, world.device):
                        loss = self.task.loss(self.forward(inputs), targets)
                    loss = loss / trainer.micro_batches
                    loss.backward()
                losses.append(loss.detach())
                seen.append((inputs, targets))
        for weight in changing:
            weight.collect_dense_gradient = False
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0], seen

    def _unsynchronised(self, wanted: bool) -> AbstractContextManager[Any]:
        """A context in which gradients stay on their rank, for all micro-batches but the last."""
        if wanted and isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return self.forward.no_sync()
        return nullcontext()

    def _average_gradients(self) -> None:
        """Average the gradients of soft choices, which are not replicated by torch."""
        logits = [c.logits for learner in self.state.learners for c in learner.choices.values()]
        self.world.mean_([p.grad for p in logits if p is not None and p.grad is not None])

    def _keep_gradients(self, changing: Sequence[SparseWeight]) -> None:
        """Keep what scores ask for, before clipping."""
        if "weight_gradient" in self.algorithm.needs:
            for weight in changing:
                gradient = weight.values.grad
                weight.weight_gradient = None if gradient is None else gradient.clone()

    def _change(self, changing: Sequence[SparseWeight]) -> None:
        moves = changes.update_topologies(
            self.state,
            self.algorithm,
            changing,
            total=self.total,
            seed=self.experiment.seed,
            world=self.world,
        )
        self._follow(moves)
        replaced = sum(move.num_grown for move in moves)
        active = sum(len(weight.active) for weight in changing)
        density = self.experiment.report.density("layers")
        self.record(
            "rewire", {"replaced": replaced, "churn": replaced / active, "density": density}
        )

    def _harden(self, learners: Sequence[Learner], seen: list[Batch], progress: float) -> None:
        """Harden the soft choices that are ready."""
        hardened, moves = changes.harden(
            self.state,
            learners,
            lambda: self._loss_of(seen),
            rule=self.algorithm.moments,
            progress=progress,
            world=self.world,
        )
        if not hardened:
            return
        self._follow(moves)
        for values in hardened:
            self.record("harden", values)
        forced = sum(values["reason"] == "deadline" for values in hardened)
        kinds = sorted({f"{values['of']}s" for values in hardened})
        self.say(
            f"step {self.state.step}: hardened {len(hardened)} {' and '.join(kinds)} ({forced} "
            f"forced), loss {hardened[0]['loss_before']:.4f} -> {hardened[-1]['loss_after']:.4f}, "
            f"{len(soft_choices(self.model))} still soft"
        )

    def _follow(self, moves: Sequence[Move]) -> None:
        """Replicate anew where the number of entries changed."""
        if any(move.new is not move.old for move in moves):
            self._replicate()

    def _half_hard(self) -> bool:
        return 0 < len(soft_choices(self.model)) < len(choices(self.model))

    @torch.no_grad()
    def _loss_of(self, seen: list[Batch]) -> float:
        """Return the loss of the batch of this step, over all ranks, without dropout."""
        self.model.eval()
        losses = []
        for inputs, targets in seen:
            with (
                eagerly(self.trainer.compile),
                forward_context(self.trainer.precision, self.world.device),
            ):
                losses.append(self.task.loss(self.model(inputs), targets))
        self.model.train()
        mean = torch.stack(losses).mean()
        self.world.mean_([mean])
        return float(mean)


def eagerly(wanted: bool) -> AbstractContextManager[Any]:
    """Return a context in which compiled blocks run uncompiled, if `wanted`."""
    return torch.compiler.set_stance("force_eager") if wanted else nullcontext()


def compile_blocks(model: nn.Module) -> None:
    """Compile, in place, every element of the outermost lists of like modules of `model`."""
    for child in model.children():
        elements = list(child.children())
        alike = len(elements) > 1 and len({type(element) for element in elements}) == 1
        if isinstance(child, nn.ModuleList | nn.Sequential) and alike:
            # The elements share their code, and each drop rate or soft permutation is a variant.
            limit = max(torch._dynamo.config.recompile_limit, 4 * len(elements))
            torch._dynamo.config.recompile_limit = limit
            for element in elements:
                element.compile()
        else:
            compile_blocks(child)
