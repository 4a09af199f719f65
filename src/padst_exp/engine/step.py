"""One optimizer step, and the changes of topology that follow it."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from padst_exp.data.task import Batch
from padst_exp.engine import changes, exchanges
from padst_exp.engine.checkpoint import random_state, restore_random_state
from padst_exp.engine.distributed import own_part
from padst_exp.engine.evaluation import forward_context, to_device
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.placement import blocks
from padst_exp.engine.state import TrainingState
from padst_exp.layers import Move, SparseWeight
from padst_exp.permutations import Permutation
from padst_exp.seeds import seed_of
from padst_exp.soft import Learner, soft_choices


class DivergedError(Exception):
    """The loss or a weight is not a finite number."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} at step {step}")


class PassError(Exception):
    """A pass through the model failed on some rank, and all have the state from before it.

    Attributes:
        own: the error of this rank; None where it met none.
    """

    def __init__(self, own: Exception | None) -> None:
        super().__init__(str(own))
        self.own = own


class Stepper:
    """Carries a `TrainingState` on by single steps.

    Args:
        experiment: what is trained and how.
        state: of its training.
        record: takes a kind of event and its values, for the metrics.
        say: takes a line for a person.

    Attributes:
        lr: learning rate of the last step.
        sound: whether the state is that of a whole number of steps. Only while weights and
            topologies change it is not: an error before that leaves the state as it was.
        resized: whether numbers of entries have changed; for whoever looks to set back.
    """

    def __init__(
        self,
        experiment: Experiment,
        state: TrainingState,
        *,
        record: Callable[[str, Mapping[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self.experiment, self.state = experiment, state
        self.record, self.say = record, say
        self.algorithm, self.trainer = experiment.algorithm, experiment.trainer
        self.model, self.world, self.placement = state.model, state.world, state.placement
        self.lr = 0.0
        self.sound = True
        self.resized = False
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        if self.trainer.compile:
            compile_blocks(self.model)
        self._take_parameters()

    def step(self, batches: Iterator[Batch]) -> None:
        """Take as many micro-batches as one step needs and carry the state on.

        Nothing here waits for the device, but for steps that change topologies or harden.

        Raises:
            DivergedError: before a change, a loss, a gradient or a weight is not finite.
            PassError: on all ranks, for an error of one of them in what comes before gradients
                are averaged, which ends with the last forward pass.
        """
        step, parts = self.state.step + 1, self.parts(batches)
        changing = changes.changing(self.experiment, self.model, step)
        due = self.experiment.learner.exchanges(
            step, self.experiment.total_steps, rewiring=bool(changing)
        )
        self._remember()
        try:
            loss, seen = self._gradients(parts, changing, due)
        except Exception:
            self._restore()
            raise
        self.sound = False
        self._advance(step, loss, seen, changing, due)
        self.sound = True

    def parts(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of one step of this rank."""
        return list(islice(batches, self.trainer.micro_batches))

    def _gradients(
        self,
        parts: Sequence[Batch],
        changing: Sequence[SparseWeight],
        due: Mapping[str, Permutation],
    ) -> tuple[Tensor, list[Batch]]:
        """Let every parameter have its gradient; return the mean loss and what was seen."""
        self.state.optimizer.zero_grad(set_to_none=True)
        self.placement.forget_gradients()
        for learner in self.state.learners:
            learner.zero_grad()
        loss, seen = self._accumulate(parts, changing, due)
        self.placement.hand_over()
        self._average_soft_gradients()
        exchanges.keep_gradients(self.experiment, changing)
        for learner in self.state.learners:
            learner.regularize_weights()
        return loss, seen

    def _advance(
        self,
        step: int,
        loss: Tensor,
        seen: list[Batch],
        changing: Sequence[SparseWeight],
        due: Mapping[str, Permutation],
    ) -> None:
        """Update weights, then topologies and choices where that is due."""
        state, total = self.state, self.experiment.total_steps
        norm = None
        if self.trainer.clip_norm is not None:
            norm = self.placement.clip_(self.parameters, self.trainer.clip_norm)
        group = state.optimizer.param_groups[0]
        self.lr = group["lr"] / group.get("lr_scale", 1.0)
        state.optimizer.step()
        state.schedule.step_update(step)
        for learner in state.learners:
            learner.step(step / total)
        if state.average is not None:
            state.average.update(step)
        state.step = step
        self._pending.append((loss, norm))

        looking = looking_at(state.learners, step, total)
        if changing or due or looking:
            self.settle()
            require_finite(state, changing, due, looking)
        if changing:
            self._change(changing)
        if due:
            self.record("exchange", exchanges.exchange(self.experiment, state, due))
        if looking:
            self._harden(looking, seen)

    def _remember(self) -> None:
        """Keep all but gradients that a pass through the model changes."""
        self._generators = random_state()
        if self._statistics:
            torch._foreach_copy_(self._before, self._statistics)

    def _restore(self) -> None:
        restore_random_state(self._generators)
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._before)

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
        for step, loss in enumerate(losses.tolist(), first):
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss}", step)
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
        both = [torch.stack([choice.penalty(), choice.gain()]) for choice in soft.values()]
        rows = dict(zip(soft, torch.stack(both).tolist(), strict=True))
        return {
            "penalty": {name: penalty for name, (penalty, _) in rows.items()},
            "gain": {name: gain for name, (_, gain) in rows.items()},
        }

    def _take_parameters(self) -> None:
        """Replicate the parameters as they are now, and know them for clipping."""
        soft = [f"{name}.logits" for name in soft_choices(self.model)]
        # The replica that was there before lets go of the parameters first.
        self.forward: nn.Module = self.model
        self.forward = self.placement.replica(self.model, soft)
        self.parameters = self.state.trained_parameters()
        # Those of batch normalisation; topologies and permutations are integers.
        self._statistics = [b for b in self.model.buffers() if b.is_floating_point() or b.ndim == 0]
        self._before = [buffer.clone() for buffer in self._statistics]

    def _accumulate(
        self,
        parts: Sequence[Batch],
        changing: Sequence[SparseWeight],
        due: Mapping[str, Permutation],
    ) -> tuple[Tensor, list[Batch]]:
        """Forward and backward of all micro-batches; return the mean loss and the batches."""
        trainer, world, task = self.trainer, self.world, self.experiment.task
        collecting = exchanges.collecting(self.experiment, self.state, changing, due)
        # What is rare or passing is not worth another compilation of every block.
        passing = bool(collecting) or any(learner.half_hard for learner in self.state.learners)
        losses, seen = [], []
        failed: Exception | None = None
        with eagerly(trainer.compile and passing):
            try:
                for micro, batch in enumerate(parts):
                    part = world.rank * trainer.micro_batches + micro
                    inputs, targets = to_device(batch, world.device, trainer.precision)
                    inputs, targets = task.augment(
                        inputs, targets, seed_of("mix", self.experiment.seed, self.state.step, part)
                    )
                    last = micro + 1 == trainer.micro_batches
                    with nullcontext() if last else self.placement.accumulating(self.forward):
                        with forward_context(trainer.precision, world.device):
                            loss = task.loss(self.forward(inputs), targets)
                        loss = loss / trainer.micro_batches
                        if not last:
                            loss.backward()
                    losses.append(loss.detach())
                    seen.append((inputs, targets))
            except Exception as error:
                failed = self.placement.excuse(self.forward, error)
            # From here on ranks wait for each other, and one that fails cannot tell the others.
            if world.largest(int(failed is not None)):
                raise PassError(failed)
            loss.backward()
        exchanges.stop_collecting(collecting)
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0], seen

    def _average_soft_gradients(self) -> None:
        """Average over ranks what the replica leaves out, since it may come and go."""
        logits = [c.logits for learner in self.state.learners for c in learner.choices.values()]
        self.world.mean_([p.grad for p in logits if p is not None and p.grad is not None])

    def _change(self, changing: Sequence[SparseWeight]) -> None:
        """Let the algorithm decide the topologies of these weights."""
        moves = changes.update_topologies(self.experiment, self.state, changing)
        self._follow(moves)
        replaced = sum(move.num_grown for move in moves)
        active = sum(len(weight.active) for weight in changing)
        density = self.experiment.report.density("layers")
        self.record(
            "rewire", {"replaced": replaced, "churn": replaced / active, "density": density}
        )

    def _harden(self, learners: Sequence[Learner], seen: list[Batch]) -> None:
        """Harden the soft choices that are ready."""
        hardened, moves = changes.harden(
            self.experiment, self.state, learners, lambda: self._loss_of(seen)
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
        """Take the parameters anew where a change of the number of entries made other ones."""
        if all(move.new is move.old for move in moves):
            return
        self.resized = True
        if self.trainer.compile:
            # Code of shapes that are no more would fill up what torch keeps for each block.
            torch.compiler.reset()
        self._take_parameters()
        if self.world.size > 1:
            gc.collect()  # the former replica is part of a cycle, and holds room for all gradients

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
                losses.append(self.experiment.task.loss(self.model(inputs), targets))
        self.model.train()
        mean = torch.stack(losses).mean()
        self.world.mean_([mean])
        return float(mean)


def looking_at(learners: Sequence[Learner], step: int, total: int) -> list[Learner]:
    """The learners that look after `step` whether a choice is ready to harden."""
    return [
        learner
        for learner in learners
        if learner.choices and (step % learner.interval == 0 or step == total)
    ]


def require_finite(
    state: changes.Changeable,
    changing: Sequence[SparseWeight],
    due: Mapping[str, Permutation],
    looking: Sequence[Learner],
) -> None:
    """Nothing is chosen by what is no finite number, on no rank.

    Raises:
        DivergedError: something is not.
    """
    weights = dict.fromkeys([*changing, *exchanges.weights_of(state, due)])
    found = [
        tensor
        for weight in weights
        for tensor in (
            weight.values.detach(),
            weight.dense_gradient,
            weight.part_gradients,
            weight.weight_gradient,
        )
    ]
    found += [c.logits for learner in looking for c in learner.choices.values()]
    tensors = [own_part(tensor.detach()) for tensor in found if tensor is not None]
    # A sum is finite only if all of it is, and takes a fraction of the time of a norm.
    sums = [tensor.sum().double() for tensor in tensors]
    finite = not sums or bool(torch.stack(sums).isfinite().all())
    if state.world.largest(int(not finite)):
        raise DivergedError("a gradient or a weight is not finite", state.step)


def eagerly(wanted: bool) -> AbstractContextManager[Any]:
    """Return a context in which compiled blocks run uncompiled, if `wanted`."""
    return torch.compiler.set_stance("force_eager") if wanted else nullcontext()


def compile_blocks(model: nn.Module) -> None:
    """Compile, in place, every element of the outermost lists of like modules of `model`."""
    for elements in blocks(model):
        # The elements share their code, and each drop rate or soft permutation is a variant.
        limit = max(torch._dynamo.config.recompile_limit, 4 * len(elements))
        torch._dynamo.config.recompile_limit = limit
        for element in elements:
            element.compile()
