"""Parameters in parts over the ranks, by FSDP2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from padst_exp.engine import checkpoint, shards
from padst_exp.engine.distributed import World, own_part
from padst_exp.engine.placement import Placement, T, Trained, blocks
from padst_exp.errors import UserError
from padst_exp.layers import SparseWeight, sparse_weights
from padst_exp.soft import choices

# Under their names from torch 2.14 on, or those before.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = (
    getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
)


class Sharded(Placement):
    """Every rank has a part of the rows of each parameter, of its gradient and its moments (FSDP2).

    The rows of packed values are units. A block is whole during its passes only; a sparse weight
    while its topology changes. The logits of soft choices are whole everywhere.
    """

    together = True

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.mesh = init_device_mesh(world.device.type, (world.size,))
        # Of each parameter that is trained, the part of this rank, in the same memory.
        self._parts: dict[nn.Parameter, nn.Parameter] = {}

    def read(self, path: Path) -> dict[str, Any]:
        payload = self._agreed(lambda: checkpoint.read_file(path))
        shared = self.world.rank, self.world.size
        self._agreed(lambda: shards.verify(payload, path, shared))
        shards.join(payload, path, self.mesh)
        self._agreed(lambda: checkpoint.require_numbers(payload, path))
        return payload

    def loadable(self, model: nn.Module, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        left_out, fresh = _logits(model), model.state_dict(keep_vars=True)
        parted = {
            name: tensor.detach()
            for name, tensor in fresh.items()
            if isinstance(tensor, nn.Parameter) and tensor not in left_out
        }
        return {**saved, **{name: here for name, here in parted.items() if name in saved}}

    def place(self, model: nn.Module, saved: Mapping[str, Tensor] | None, path: Path) -> None:
        groups = [[block] for elements in blocks(model) for block in elements] + [[model]]
        _require_shardable(model, [block for (block,) in groups[:-1]])
        left_out = _logits(model)
        for (module,) in groups:
            # Also the outermost one, which would else be whole from an evaluation on.
            fully_shard(module, mesh=self.mesh, ignored_params=left_out, reshard_after_forward=True)
        for weight in sparse_weights(model).values():
            weight.reduce_gradient = self._own_rows
        for name, parameter in model.named_parameters():
            if not isinstance(parameter, DTensor):
                continue
            part = own_part(parameter.detach())
            if saved is not None:
                with checkpoint.restoring(path, name):
                    part.copy_(self._fit(saved[name], part))
            if parameter.requires_grad:
                self._parts[parameter] = nn.Parameter(part)

    def trained(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._parts[parameter]

    def replica(self, model: nn.Module, by_hand: Iterable[str]) -> nn.Module:
        return model

    def excuse(self, replica: nn.Module, error: Exception) -> Exception:
        raise error

    def hand_over(self) -> None:
        for parameter, part in self._parts.items():
            part.grad = None if parameter.grad is None else own_part(parameter.grad)

    def forget_gradients(self) -> None:
        for parameter in self._parts:
            parameter.grad = None

    def clip_(self, parameters: Sequence[Tensor], most: float) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        square = norm.square()
        self.world.sum_([square])
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return norm

    def mean_gradient_(self, weight: SparseWeight) -> None:
        if weight.dense_gradient is not None:
            weight.dense_gradient = self._gather(weight.dense_gradient, weight.shape[0])

    @contextmanager
    def whole(self, state: Trained, names: Iterable[str]) -> Iterator[None]:
        models = [state.model, *([] if state.average is None else [state.average.model])]
        with ExitStack() as stack:
            for name in dict.fromkeys(names):
                for model in models:
                    weight = model.get_submodule(name)
                    assert isinstance(weight, SparseWeight)
                    stack.enter_context(self._whole(weight, state.optimizer))
            yield

    def write(self, payload: dict[str, Any], folder: Path) -> dict[str, Any]:
        return shards.write(payload, folder, self.world)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        rows = {part: len(parameter) for parameter, part in self._parts.items()}
        for index, part in enumerate(_parameters(optimizer)):
            if (kept := state["state"].get(index)) is not None:
                state["state"][index] = _each(kept, part, partial(self._known, rows=rows[part]))
        return state

    def fitting(self, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> Any:
        state, parts = dict(saved["state"]), _parameters(optimizer)
        for index, kept in state.items():
            state[index] = {
                name: self._fit(value, parts[index])
                if isinstance(value, Tensor) and value.ndim == parts[index].ndim
                else value
                for name, value in kept.items()
            }
        return {**saved, "state": state}

    def in_step(self, batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
        iterator, last = iter(batches), None
        while True:
            batch, error = None, None
            try:
                batch = next(iterator, None)
            except Exception as failure:
                error = failure
            last = last if batch is None else batch
            # There is nothing to repeat for a rank without any sample.
            state = 2 if error is not None or last is None else int(batch is not None)
            most = self.world.largest(state)
            if error is not None:
                raise error
            if last is None:
                raise UserError(
                    f"dataset: expected at least {self.world.size} validation samples with "
                    f"trainer.parallel=fsdp on {self.world.size} processes, got fewer"
                )
            if most != 1:
                return
            yield last, batch is not None

    @contextmanager
    def _whole(self, weight: SparseWeight, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """A block in which the values of one weight and their moments are whole."""
        sharded = weight.values
        rows, part = len(sharded), own_part(sharded.detach())
        whole = nn.Parameter(self._gather(part, rows), requires_grad=sharded.requires_grad)
        trained = self._parts.get(sharded)
        if trained is not None:
            _exchange(optimizer, trained, whole, partial(self._gather, rows=rows))
            if weight.weight_gradient is not None:
                weight.weight_gradient = self._gather(weight.weight_gradient, rows)
        weight.values = whole
        yield
        found, wanted = len(weight.values), "one that keeps the number of entries"
        if weight.values is not whole:
            raise UserError(
                f"dst: expected {wanted} with trainer.parallel=fsdp, got one that made {found} "
                f"units of {rows}"
            )
        part.copy_(self._part(whole.detach()))
        if trained is not None:
            _exchange(optimizer, whole, trained, lambda tensor: self._part(tensor).clone())
        weight.values = sharded

    def _agreed(self, action: Callable[[], T]) -> T:
        """Do the same on every rank, and go on where none failed."""
        result, error = None, None
        try:
            result = action()
        except Exception as failure:
            error = failure
        self.world.agree(error)
        return result  # type: ignore[return-value]

    def _rows_of(self, rows: int) -> tuple[int, int]:
        """First and number of the rows that this rank has, of so many."""
        return shards.rows_of(rows, self.world.rank, self.world.size)

    def _part(self, whole: Tensor) -> Tensor:
        """The rows of this rank."""
        return whole.narrow(0, *self._rows_of(len(whole)))

    def _fit(self, saved: Tensor, part: Tensor) -> Tensor:
        """What this rank has of a tensor that was read whole, or as the part of this rank."""
        return saved if len(saved) == len(part) else self._part(saved)

    def _known(self, part: Tensor, rows: int) -> DTensor:
        """A part of `rows` rows that knows what it is a part of."""
        return shards.part_of((rows, *part.shape[1:]), part, self.mesh)

    def _gather(self, part: Tensor, rows: int) -> Tensor:
        """All `rows` rows of what this rank has a part of."""
        most = math.ceil(rows / self.world.size)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: len(part)] = part
        whole = part.new_empty(most * self.world.size, *part.shape[1:])
        # As bytes: gloo knows no integers of two.
        _all_gather(whole.flatten().view(torch.uint8), padded.flatten().view(torch.uint8))
        return whole[:rows]

    def _own_rows(self, gradient: Tensor) -> Tensor:
        """The rows of this rank in the mean over ranks of a matrix."""
        rows, size = len(gradient), self.world.size
        most = math.ceil(rows / size)
        padded = gradient.new_zeros(most * size, *gradient.shape[1:])
        padded[:rows] = gradient
        mean = gradient.new_empty(most, *gradient.shape[1:])
        _reduce_scatter(mean, padded)
        return mean[: self._rows_of(rows)[1]].div_(size)


def _logits(model: nn.Module) -> set[nn.Parameter]:
    return {choice.logits for choice in choices(model).values() if choice.logits is not None}


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """In the order in which a state numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _each(
    kept: Mapping[str, Any], like: Tensor, action: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """What an optimizer keeps of a parameter, with an `action` done to what has a row for each."""
    return {
        name: action(value)
        if isinstance(value, Tensor) and value.ndim == like.ndim and len(value) == len(like)
        else value
        for name, value in kept.items()
    }


def _exchange(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    action: Callable[[Tensor], Tensor],
) -> None:
    """Let `new` stand for `old` in an optimizer, with what it keeps of each row."""
    for group in optimizer.param_groups:
        if any(parameter is old for parameter in group["params"]):
            group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = _each(optimizer.state.pop(old), old, action)


def _require_shardable(model: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Refuse parameters that no rows can be taken of, or that several blocks share.

    Raises:
        UserError: names one of them.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    wanted = "expected ddp for this model, got fsdp"
    for parameter, name in names.items():
        if parameter.ndim == 0:
            raise UserError(f"trainer.parallel: {wanted} ({name} is a single number)")
    owners: dict[nn.Parameter, int] = {}
    inside = {module for part in parts for module in part.modules()}
    rest = [p for m in model.modules() if m not in inside for p in m.parameters(recurse=False)]
    for number, group in enumerate([rest, *(list(part.parameters()) for part in parts)]):
        for parameter in group:
            if owners.setdefault(parameter, number) != number:
                raise UserError(
                    f"trainer.parallel: {wanted} ({names[parameter]} is shared between blocks)"
                )
