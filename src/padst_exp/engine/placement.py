"""Where parameters are on the ranks that train them: all of them on each, or parts on each.

Whoever reads or writes parameters, gradients or moments outside a pass of the model asks here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.engine.ema import Average
from padst_exp.engine.settings import Parallel
from padst_exp.layers import SparseWeight

T = TypeVar("T")


class Trained(Protocol):
    """Whose parameters lie on ranks."""

    @property
    def model(self) -> nn.Module:
        """Trained."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of its parameters."""

    @property
    def average(self) -> Average | None:
        """Of the model."""


def blocks(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The elements of each of the outermost lists of like modules of `model`."""
    for child in model.children():
        elements = list(child.children())
        alike = len(elements) > 1 and len({type(element) for element in elements}) == 1
        if isinstance(child, nn.ModuleList | nn.Sequential) and alike:
            yield elements
        else:
            yield from blocks(child)


def placement_of(parallel: Parallel, world: World) -> Placement:
    """The placement that a trainer asks for; one process has all of everything."""
    if parallel == "ddp" or world.size == 1:
        return Placement(world)
    from padst_exp.engine.sharded import Sharded

    return Sharded(world)


class Placement:
    """Every rank has all parameters; their gradients are averaged (DDP).

    Args:
        world: the ranks.

    Attributes:
        together: whether a forward pass is one of all ranks, which wait for each other in it.
    """

    together = False

    def __init__(self, world: World) -> None:
        self.world = world

    def read(self, path: Path) -> dict[str, Any]:
        """What is in a checkpoint, as far as this rank has a part in it. A collective.

        Raises:
            UserError: as `checkpoint.read`, on all ranks.
        """
        return checkpoint.read(path)

    def loadable(self, model: nn.Module, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of the `saved` state of `model`, what can be loaded before `place`."""
        return saved

    def place(self, model: nn.Module, saved: Mapping[str, Tensor] | None, path: Path) -> None:
        """Lay out `model`, which is whole so far, with the parameters of a checkpoint if `saved`.

        Args:
            model: on its device.
            saved: its state in the checkpoint.
            path: of the checkpoint, for messages.
        """

    def trained(self, parameter: nn.Parameter) -> nn.Parameter:
        """What an optimizer is to have for a parameter of a model that was placed."""
        return parameter

    def replica(self, model: nn.Module, by_hand: Iterable[str]) -> nn.Module:
        """What computes `model` so that gradients are averaged, but for parameters `by_hand`.

        Those may come and go without breaking the buckets of the others.
        """
        if self.world.size == 1:
            return model
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(by_hand))
        # Told once of every convolution of one channel, whose strides are ambiguous; harmless.
        warnings.filterwarnings("ignore", message="(?s)Grad strides do not match bucket view")
        device = self.world.device
        with warnings.catch_warnings():
            # The name of broadcast_buffers changes after torch 2.14; older ones know only this.
            warnings.simplefilter("ignore", FutureWarning)
            # Ranks start equal and stay so; only batch statistics drift: `average_statistics`.
            return DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def accumulating(self, replica: nn.Module) -> AbstractContextManager[Any]:
        """A context in which gradients add up, for all micro-batches of a step but the last."""
        if isinstance(replica, DistributedDataParallel):
            return replica.no_sync()
        return nullcontext()

    def excuse(self, replica: nn.Module, error: Exception) -> Exception:
        """Let others finish a forward pass in which this rank met `error`, if that can be.

        Raises:
            Exception: `error`; others wait in vain, until this process has ended.
        """
        if isinstance(replica, DistributedDataParallel):
            # The first forward pass but one of a replica communicates; others are in it.
            replica.reducer._rebuild_buckets()
        return error

    def hand_over(self) -> None:
        """Give the optimizer the gradients of the passes since `forget_gradients`."""

    def forget_gradients(self) -> None:
        """Let the next pass begin with none."""

    def clip_(self, parameters: Sequence[Tensor], most: float) -> Tensor:
        """Scale the gradients of the optimizer's `parameters` down to the norm `most`.

        Returns:
            The norm that they had, over all ranks.
        """
        return nn.utils.clip_grad_norm_(parameters, most)

    def mean_gradient_(self, weight: SparseWeight) -> None:
        """Let `weight.dense_gradient` be all of the mean over ranks."""
        if weight.dense_gradient is not None:
            self.world.mean_([weight.dense_gradient])

    @contextmanager
    def whole(self, state: Trained, names: Iterable[str]) -> Iterator[None]:
        """A block in which some sparse weights are whole: values, moments, averages.

        What becomes of them there, equally on every rank, is kept.

        Args:
            state: its model, optimizer and average.
            names: of the weights in the model.
        """
        yield

    def write(self, payload: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Write what ranks have parts of to a folder in `folder`; return the rest. A collective.

        Raises:
            UserError: on all ranks, where that cannot be done.
        """
        return {**payload, "shards": None}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of `optimizer`, in which parts know what they are parts of."""
        return optimizer.state_dict()

    def fitting(self, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> Any:
        """The `saved` state of all of an optimizer, or of parts, as far as this rank has it."""
        return saved

    def in_step(self, batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Each of `batches`, and whether it counts: the same number of them on every rank.

        Raises:
            Exception: of reading a batch, on its rank; others stop there.
        """
        for batch in batches:
            yield batch, True
