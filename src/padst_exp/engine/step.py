"""One optimizer step, and the changes of topology that follow it."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from padst_exp.data.seeding import seed_of
from padst_exp.data.task import Task
from padst_exp.dst import Algorithm
from padst_exp.engine import topology
from padst_exp.engine.distributed import World
from padst_exp.engine.evaluation import forward_context, to_device
from padst_exp.engine.settings import Trainer
from padst_exp.engine.state import TrainingState
from padst_exp.layers import permutations, sparse_weights
from padst_exp.permutations import Learner

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
        record: takes a kind of event and its values, for the metrics.
        say: takes a line for a person.

    Attributes:
        lr: learning rate of the last step.
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        task: Task,
        algorithm: Algorithm,
        learner: Learner,
        trainer: Trainer,
        world: World,
        seed: int,
        total: int,
        record: Callable[[str, Mapping[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self.state, self.task, self.algorithm, self.learner = state, task, algorithm, learner
        self.trainer, self.world, self.seed, self.total = trainer, world, seed, total
        self.record, self.say = record, say
        self.model = state.model
        if trainer.compile:
            compile_blocks(self.model)
        self.soft = topology.soft_permutations(self.model)
        self.forward = world.replicate(self.model, [f"{name}.logits" for name in self.soft])
        self.dynamic = [w for w in sparse_weights(self.model).values() if not w.static]
        self.parameters = state.trained_parameters()
        self.lr = 0.0
        self._pending: list[tuple[Tensor, Tensor | None]] = []

    def step(self, batches: Iterator[Batch]) -> None:
        """Take as many micro-batches as one step needs and carry the state on.

        Nothing here waits for the device, but for steps that rewire or harden.
        """
        state = self.state
        step, progress = state.step + 1, (state.step + 1) / self.total
        rewiring = bool(self.dynamic) and self.algorithm.is_due(step, self.total)

        state.optimizer.zero_grad(set_to_none=True)
        if state.permutation_optimizer is not None:
            state.permutation_optimizer.zero_grad(set_to_none=True)
        loss, seen = self._accumulate(batches, rewiring and self.algorithm.needs_dense_gradient)
        soft = list(self.soft.values())
        if soft:
            self._average_gradients()
            self.learner.regularize(soft, progress)
        norm = None
        if self.trainer.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.trainer.clip_norm)
        self.lr = state.optimizer.param_groups[0]["lr"]
        state.optimizer.step()
        state.schedule.step_update(step)
        if state.permutation_optimizer is not None:
            state.permutation_optimizer.step()
            self.learner.project(soft)
        if state.average is not None:
            state.average.update(step)
        state.step = step
        self._pending.append((loss, norm))
        # Together with rewiring, so that compiled code and its inputs change rarely.
        hardening = bool(soft) and (step % self.algorithm.interval == 0 or step == self.total)
        if rewiring or hardening:
            self.settle()  # no topology or permutation is chosen by a gradient that is not finite
        if rewiring:
            self._rewire()
        if hardening:
            self._harden(seen, progress)

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
    def permutation_metrics(self) -> dict[str, dict[str, float]]:
        """Return penalty and gain of each permutation that still is soft, by name."""
        if not self.soft:
            return {}
        both = torch.stack([p.penalty_and_gain() for p in self.soft.values()]).tolist()
        rows = dict(zip(self.soft, both, strict=True))
        return {
            "penalty": {name: penalty for name, (penalty, _) in rows.items()},
            "gain": {name: gain for name, (_, gain) in rows.items()},
        }

    def _accumulate(self, batches: Iterator[Batch], collect: bool) -> tuple[Tensor, list[Batch]]:
        """Forward and backward of all micro-batches; return the mean loss and the batches."""
        trainer, world = self.trainer, self.world
        for weight in self.dynamic:
            weight.collect_dense_gradient = collect
        # What is rare or passing is not worth another compilation of every block.
        losses, seen = [], []
        with eagerly(trainer.compile and (collect or self._half_hard())):
            for micro in range(trainer.micro_batches):
                part = world.rank * trainer.micro_batches + micro
                inputs, targets = to_device(next(batches), world.device, trainer.precision)
                inputs, targets = self.task.augment(
                    inputs, targets, seed_of("mix", self.seed, self.state.step, part)
                )
                with self._unsynchronised(micro + 1 < trainer.micro_batches):
                    with forward_context(trainer.precision, world.device):
                        loss = self.task.loss(self.forward(inputs), targets)
                    loss = loss / trainer.micro_batches
                    loss.backward()
                losses.append(loss.detach())
                seen.append((inputs, targets))
        for weight in self.dynamic:
            weight.collect_dense_gradient = False
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0], seen

    def _unsynchronised(self, wanted: bool) -> AbstractContextManager[Any]:
        """A context in which gradients stay on their rank, for all micro-batches but the last."""
        if wanted and isinstance(self.forward, nn.parallel.DistributedDataParallel):
            return self.forward.no_sync()
        return nullcontext()

    def _average_gradients(self) -> None:
        """Average the gradients of soft permutations, which are not replicated by torch."""
        logits = [p.logits for p in self.soft.values()]
        self.world.mean_([p.grad for p in logits if p is not None and p.grad is not None])

    def _rewire(self) -> None:
        state = self.state
        replaced = topology.rewire(
            self.model,
            self.algorithm,
            state.optimizer,
            state.average,
            state.tracker,
            step=state.step,
            total=self.total,
            seed=self.seed,
            world=self.world,
        )
        active = sum(len(weight.active) for weight in self.dynamic)
        self.record("rewire", {"replaced": replaced, "churn": replaced / active})

    def _harden(self, seen: list[Batch], progress: float) -> None:
        """Harden the soft permutations that are ready."""
        state = self.state
        hardened = topology.harden(
            self.model,
            self.learner,
            state.permutation_optimizer,
            state.average,
            lambda: self._loss_of(seen),
            step=state.step,
            progress=progress,
            world=self.world,
        )
        if not hardened:
            return
        self.soft = topology.soft_permutations(self.model)
        if not self.soft:
            state.permutation_optimizer = None
        for values in hardened:
            self.record("harden", values)
        forced = sum(values["reason"] == "deadline" for values in hardened)
        self.say(
            f"step {state.step}: hardened {len(hardened)} permutations ({forced} forced), loss "
            f"{hardened[0]['loss_before']:.4f} -> {hardened[-1]['loss_after']:.4f}, "
            f"{len(self.soft)} still soft"
        )

    def _half_hard(self) -> bool:
        return 0 < len(self.soft) < len(permutations(self.model))

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
