"""Changes of a model in training: topologies, permutations, and everything that must follow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from padst_exp.dst import Algorithm, Change
from padst_exp.engine.adamw import birth_dtype
from padst_exp.engine.distributed import World
from padst_exp.engine.optimizers import lr_scale
from padst_exp.engine.placement import Placement, Trained
from padst_exp.engine.tracker import Births, TopologyTracker
from padst_exp.errors import UserError, require
from padst_exp.layers import Move, SparseWeight, index_stale, permutations, sparse_weights
from padst_exp.permutations import Permutation, PermutationLearner
from padst_exp.seeds import stream
from padst_exp.soft import Learner

# Of an optimizer's state, what is an average of gradients themselves.
SIGNED = ("exp_avg", "momentum_buffer")


class Method(Protocol):
    """What changes a model: an `Experiment`, or a part of a program that trains otherwise."""

    @property
    def algorithm(self) -> Algorithm:
        """Changes the topologies."""

    @property
    def learner(self) -> PermutationLearner:
        """Trains the permutations."""

    @property
    def seed(self) -> int:
        """Of growth."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""


class Changeable(Trained, Protocol):
    """What is changed: a `TrainingState`, or what has as much of one."""

    @property
    def world(self) -> World:
        """Of this process."""

    @property
    def placement(self) -> Placement:
        """Of its parameters over the ranks."""

    @property
    def step(self) -> int:
        """Completed steps."""

    @property
    def tracker(self) -> TopologyTracker:
        """Counts changes."""

    @property
    def births(self) -> Births | None:
        """When each active unit was grown."""


class Follower(Protocol):
    """Has something that must move along when the topology of a weight changes."""

    def follow(self, name: str, weight: SparseWeight, move: Move, step: int) -> None:
        """Move it.

        Args:
            name: of the weight.
            weight: in its new topology already.
            move: the map from the old one.
            step: completed steps.
        """


class Moments:
    """The optimizer's state of every weight; a new Parameter takes the place of the old one.

    Args:
        optimizer: of all values.
        rule: "age": grown entries are born at the step of the change (see `AgeAwareAdamW`);
            "zero": their moments are zero and that is all.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rule: str) -> None:
        self.optimizer = optimizer
        self.rule = rule

    def check(self, weight: SparseWeight) -> None:
        """Refuse a state that no map of entries can move, before anything is moved.

        Raises:
            UserError: a tensor of the state of `weight` has another shape than its values.
        """
        shape = weight.values.shape
        for key, tensor in self.optimizer.state.get(weight.values, {}).items():
            if not isinstance(tensor, Tensor) or tensor.ndim == 0 or key in ("birth", "births"):
                continue
            kind = type(self.optimizer).__name__
            wanted = f"one whose state has the shape of its weight, {tuple(shape)}, to move along"
            require(tensor.shape == shape, "optimizer", f"{kind} ({key})", wanted)

    def follow(self, name: str, weight: SparseWeight, move: Move, step: int) -> None:
        """Move the moments and births of one weight."""
        for group in self.optimizer.param_groups:
            # A rewiring that keeps the number of entries changes neither.
            if move.new is move.old and "lr_scale" not in group:
                continue
            if any(parameter is move.old for parameter in group["params"]):
                group["params"] = [move.new if p is move.old else p for p in group["params"]]
                if "lr_scale" in group:
                    base = group["lr"] / group["lr_scale"]
                    group["lr_scale"] = lr_scale(weight)
                    group["lr"] = base * group["lr_scale"]
        state = self.optimizer.state.pop(move.old, None)
        if not state:
            return
        aware = self.rule == "age" and isinstance(self.optimizer, torch.optim.Adam)
        if aware and move.num_grown:
            moment = next(state[key] for key in SIGNED if key in state)
            if "birth" not in state:
                one_each = moment[:, :1] if weight.storage == "packed" else moment
                state["birth"] = torch.zeros_like(one_each, dtype=torch.int16)
                state["births"] = moment.new_zeros(1)
            state["births"] = torch.cat([state["births"], moment.new_full((1,), step)])
            state["birth"] = state["birth"].to(birth_dtype(state["births"]))
        for key, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.ndim > 0 and key != "births":
                fill = len(state["births"]) - 1 if key == "birth" else 0.0
                state[key] = move(tensor, fill, signed=key in SIGNED)
        self.optimizer.state[move.new] = state


def followers(experiment: Method, state: Changeable) -> list[Follower]:
    """The one list of what moves along when a topology changes."""
    each: list[Follower | None] = [
        Moments(state.optimizer, experiment.algorithm.moments),
        state.average,
        state.tracker,
        state.births,
    ]
    return [follower for follower in each if follower is not None]


def changing(experiment: Method, model: nn.Module, step: int) -> list[SparseWeight]:
    """The weights whose topology is to be decided after `step`."""
    if not experiment.algorithm.is_due(step, experiment.total_steps):
        return []
    return [
        weight
        for weight in sparse_weights(model).values()
        if weight.selection is None
        and not weight.frozen
        and experiment.algorithm.can_change(weight.topology())
    ]


def update_topologies(
    experiment: Method, state: Changeable, weights: Iterable[SparseWeight]
) -> list[Move]:
    """Let the algorithm decide the next topology of each of `weights`, and adopt it.

    Returns:
        What was done to each weight, in order.

    Raises:
        UserError: no gradient that the algorithm asks for reached one of them; nothing has
            happened then.
    """
    changing, following = set(weights), followers(experiment, state)
    needs = experiment.algorithm.needs & {"dense_gradient", "weight_gradient"}
    for name, weight in sparse_weights(state.model).items():
        if weight in changing and any(getattr(weight, need) is None for need in needs):
            raise UserError(
                f"layer {name}: dst chooses its units by its gradient, and there is none at step "
                f"{state.step}; leave it dense, or let the forward pass use it"
            )
    moves = []
    for position, (name, weight) in enumerate(sparse_weights(state.model).items()):
        if weight not in changing:
            continue
        state.placement.mean_gradient_(weight)
        with state.placement.whole(state, [name]):
            change = weight.decide(
                experiment.algorithm,
                step=state.step,
                total=experiment.total_steps,
                # Seeded anew for each decision: ranks agree, and a checkpoint need not hold it.
                generator=stream(experiment.seed, "rewire", state.step, position),
                birth=None if state.births is None else state.births.steps[name],
            )
            weight.dense_gradient = weight.weight_gradient = None
            moves.append(adopt(name, weight, change, following, state.step))
    state.tracker.updates += 1
    finish(state, "topologies")
    return moves


def harden(
    experiment: Method,
    state: Changeable,
    learners: Iterable[Learner],
    loss: Callable[[], float],
) -> tuple[list[dict[str, Any]], list[Move]]:
    """Harden every soft choice that is ready, one after the other.

    Args:
        experiment: what is trained.
        state: its model's choices harden, those of its average adopt the same.
        learners: tell which are ready, and let go of them.
        loss: of the current training batch, averaged over ranks; called before and after each.

    Returns:
        One record for each hardened choice (its name, step, why, penalty and gain just before,
        loss before and after), and the changes of topology that came of them.
    """
    progress, world = state.step / experiment.total_steps, state.world
    following = followers(experiment, state)
    records: list[dict[str, Any]] = []
    moves: list[Move] = []
    before: float | None = None
    for learner in learners:
        for name, choice in list(learner.choices.items()):
            # Rank 0 decides for all: a rounding difference must not part the ranks.
            reason = world.from_main(learner.ready(choice, progress))
            if reason is None:
                continue
            before = loss() if before is None else before
            record = {
                "choice": name,
                "of": "permutation" if isinstance(choice, Permutation) else "selection",
                "step": state.step,
                "reason": reason,
                "penalty": float(choice.penalty().detach()),
                "gain": float(choice.gain()),
            }
            if isinstance(choice, Permutation):
                record["agreement"] = choice.agreement()
            logits = choice.logits
            hard = world.from_main(choice.nearest().cpu())
            choice.harden(hard.to(next(choice.buffers()).device))
            learner.release(name, logits)
            if state.average is not None:
                state.average.harden(name, hard)
            moves += _settle(state, following)
            index_stale(state.model)
            after = loss()
            records.append({**record, "loss_before": before, "loss_after": after})
            before = after
    if records:
        finish(state, "hard choices")
    return records, moves


def adopt(
    name: str, weight: SparseWeight, change: Change, following: Iterable[Follower], step: int
) -> Move:
    """Let one weight take a new topology, and all that follows it go along."""
    for follower in following:
        if isinstance(follower, Moments):
            follower.check(weight)
    move = weight.adopt(change)
    for follower in following:
        follower.follow(name, weight, move, step)
    return move


def _settle(state: Changeable, following: Iterable[Follower]) -> list[Move]:
    """Adopt what hard selections have chosen."""
    moves = []
    for name, weight in sparse_weights(state.model).items():
        change = weight.settle()
        if change is not None:
            moves.append(adopt(name, weight, change, following, state.step))
    return moves


def finish(state: Changeable, what: str) -> None:
    """Derive anew what depends on topologies and choices, and make sure that ranks agree."""
    index_stale(state.model)
    if state.average is not None:
        index_stale(state.average.model)
        state.average.pair(state.model)
    if state.world.size > 1:
        state.world.assert_identical(
            topology_digest(state.model), f"{what} after step {state.step}"
        )


def topology_digest(model: nn.Module) -> str:
    """Return a hash of all active units, row orders and permutations."""
    digest = hashlib.sha256()
    for weight in sparse_weights(model).values():
        for tensor in (weight.active, weight.row_order):
            if tensor is not None:
                digest.update(tensor.cpu().numpy().tobytes())
    for permutation in permutations(model).values():
        digest.update(permutation.index.cpu().numpy().tobytes())
    return digest.hexdigest()
