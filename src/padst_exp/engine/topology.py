"""Changes of topology while training: rewiring and hardening, and what must move along."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from padst_exp.dst import Algorithm, Relayout
from padst_exp.engine.distributed import World
from padst_exp.engine.ema import Average
from padst_exp.engine.optimizers import birth_dtype
from padst_exp.layers import SparseLinear, SparseWeight, permutations, sparse_weights
from padst_exp.permutations import Learner, Permutation
from padst_exp.seeds import stream


class TopologyTracker:
    """What the topologies of a model have been through, for the summary.

    Attributes:
        initial: int32 active units of each weight before the first step.
        rewires: updates so far.
        replaced: active units replaced, per weight, summed over the updates.
        seen: bool, which units of each weight have ever been active.
    """

    def __init__(self, weights: dict[str, SparseWeight]) -> None:
        self.initial = {name: weight.active.clone() for name, weight in weights.items()}
        self.rewires = 0
        self.replaced = dict.fromkeys(weights, 0)
        self.seen = {name: _first_seen(weight) for name, weight in weights.items()}

    def record(self, name: str, relayout: Relayout) -> int:
        """Count one update of one weight; return how many units were replaced."""
        self.seen[name][relayout.active.long().cpu()] = True
        grown = relayout.num_grown
        self.replaced[name] += grown
        return grown

    def explored(self, name: str, weight: SparseWeight) -> float:
        """Share of the units of a weight that have ever been active (R in Liu et al. 2021)."""
        return int(self.seen[name].sum()) / int(weight.layout.candidates.sum())

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; `initial` follows from the seed."""
        return {"rewires": self.rewires, "replaced": self.replaced, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.rewires = state["rewires"]
        self.replaced = dict(state["replaced"])
        for name, seen in state["seen"].items():
            self.seen[name].copy_(seen)


def _first_seen(weight: SparseWeight) -> Tensor:
    size = weight.layout.num_pools * weight.layout.pool_size
    # On the host: one bool for every candidate is as much as the values of a 90% sparse weight.
    seen = torch.zeros(size, dtype=torch.bool)
    seen[weight.active.long().cpu()] = True
    return seen


def rewire(
    model: nn.Module,
    algorithm: Algorithm,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    tracker: TopologyTracker,
    *,
    step: int,
    total: int,
    seed: int,
    world: World,
) -> int:
    """Give every sparse weight that is not static its next topology.

    Returns:
        How many units were replaced.
    """
    averaged = sparse_weights(average.model) if average is not None else {}
    replaced = 0
    for position, (name, weight) in enumerate(sparse_weights(model).items()):
        if weight.static:
            continue
        if weight.dense_gradient is not None:
            world.mean_([weight.dense_gradient])
        # Seeded anew for each decision: ranks agree, and a checkpoint need not hold it.
        generator = stream(seed, "rewire", step, position)
        relayout = weight.rewire(algorithm, step=step, total=total, generator=generator)
        weight.dense_gradient = None
        move_state(weight, relayout, optimizer, algorithm.moments, step)
        weight.relayout_(relayout)
        if name in averaged:
            averaged[name].relayout_(relayout)
        replaced += tracker.record(name, relayout)
    fold(model)
    if average is not None:
        fold(average.model)
    tracker.rewires += 1
    if world.size > 1:
        world.assert_identical(topology_digest(model), f"topologies after step {step}")
    return replaced


def move_state(
    weight: SparseWeight,
    relayout: Relayout,
    optimizer: torch.optim.Optimizer,
    moments: str,
    step: int,
) -> None:
    """Move the optimizer state of one weight to the topology that it is about to take.

    Args:
        weight: still in its old topology.
        relayout: the decision.
        optimizer: of the weight's values.
        moments: "age": grown entries are born at `step` (see `AgeAwareAdamW`); "zero": their
            moments are zero and that is all.
        step: completed steps.
    """
    state = optimizer.state.get(weight.values)
    if not state:
        return
    if moments == "age" and isinstance(optimizer, torch.optim.Adam):
        values = weight.values.detach()
        if "birth" not in state:
            one_each = values[:, :1] if weight.storage == "packed" else values
            state["birth"] = torch.zeros_like(one_each, dtype=torch.int16)
            state["births"] = values.new_zeros(1)
        state["births"] = torch.cat([state["births"], values.new_full((1,), step)])
        state["birth"] = state["birth"].to(birth_dtype(state["births"]))
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.ndim > 0 and key != "births":
            fill = len(state["births"]) - 1 if key == "birth" else 0.0
            state[key] = weight.move(tensor, relayout, fill=fill)


def harden(
    model: nn.Module,
    learner: Learner,
    optimizer: torch.optim.Optimizer | None,
    average: Average | None,
    loss: Callable[[], float],
    *,
    step: int,
    progress: float,
    world: World,
) -> list[dict[str, Any]]:
    """Harden every permutation that is ready, one after the other.

    Args:
        model: its permutations harden; those of `average` adopt the same indices.
        learner: tells which are ready.
        optimizer: of the soft matrices; loses what hardens.
        loss: of the current training batch, averaged over ranks; called before and after each.
        step: completed steps.
        progress: completed steps over all steps.

    Returns:
        One record for each hardened permutation: name, step, why, penalty, gain and agreement
        just before, loss before and after.
    """
    records: list[dict[str, Any]] = []
    before: float | None = None
    for name, permutation in permutations(model).items():
        if not permutation.soft:
            continue
        # Rank 0 decides for all: a rounding difference must not part the ranks.
        reason = world.from_main(learner.ready(permutation, progress))
        if reason is None:
            continue
        before = loss() if before is None else before
        penalty = float(permutation.penalty().detach())
        record: dict[str, Any] = {
            "permutation": name,
            "step": step,
            "reason": reason,
            "penalty": penalty,
            "gain": permutation.gain(),
        }
        logits = permutation.logits
        permutation.harden(world.from_main(permutation.nearest().cpu()))
        fold(model)
        forget(optimizer, logits)
        after = loss()
        records.append(
            {
                **record,
                "agreement": permutation.agreement(),
                "loss_before": before,
                "loss_after": after,
            }
        )
        before = after
    if records:
        if average is not None:
            average.follow(model)
        if world.size > 1:
            world.assert_identical(topology_digest(model), f"permutations after step {step}")
    return records


def fold(model: nn.Module) -> None:
    """Fold what has changed now, not in a forward pass, which may be a compiled one."""
    for layer in model.modules():
        if isinstance(layer, SparseLinear) and layer.stale:
            layer.fold()


def forget(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter | None) -> None:
    """Remove `parameter` and its state from `optimizer`."""
    if optimizer is None or parameter is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [other for other in group["params"] if other is not parameter]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    optimizer.state.pop(parameter, None)


def soft_permutations(model: nn.Module) -> dict[str, Permutation]:
    """Return the permutations of `model` that still are matrices, by name."""
    return {name: p for name, p in permutations(model).items() if p.soft}


def topology_digest(model: nn.Module) -> str:
    """Return a hash of all active units and permutations of `model`."""
    digest = hashlib.sha256()
    tensors: Sequence[Tensor] = [
        *(weight.active for weight in sparse_weights(model).values()),
        *(permutation.index for permutation in permutations(model).values()),
    ]
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
