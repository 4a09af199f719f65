"""The processes that train together: one, or as many as torchrun started."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from padst_exp.engine.rendezvous import PATIENCE, meet, variable
from padst_exp.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers. Every method is a collective: all ranks call it alike.

    Attributes:
        rank: 0 is the process that writes files and talks.
        size: number of processes.
        device: what this process computes on.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average `tensors`, of any shapes and one dtype, over all ranks, in place."""
        self.sum_(tensors)
        if self.size > 1:
            for tensor in tensors:
                tensor.div_(self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up `tensors`, of any shapes and one dtype, over all ranks, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))

    def largest(self, number: int) -> int:
        """Return the largest `number` of all ranks. On the host: waits for no device."""
        if self.size == 1:
            return number
        box = torch.tensor(number)
        distributed.all_reduce(box, distributed.ReduceOp.MAX)
        return int(box)

    def agree(self, error: Exception | None) -> None:
        """Go on where no rank has met an `error`; else raise it there, and its line elsewhere."""
        if not self.largest(int(error is not None)):
            return
        told = self.gather(None if error is None else " ".join(str(error).split()))
        if error is not None:
            raise error
        rank = next(rank for rank, line in enumerate(told) if line is not None)
        raise UserError(f"process {rank} of {self.size} failed: {told[rank]}")

    def first(self, action: Callable[[], T]) -> T | None:
        """Do `action` on rank 0, and go on when it is done; fail on all ranks where it fails.

        Returns:
            What it returned; None on other ranks.
        """
        result, error = None, None
        if self.main:
            try:
                result = action()
            except Exception as failure:
                error = failure
        self.agree(error)
        return result

    def from_main(self, value: T) -> T:
        """Return rank 0's `value` (anything that pickles) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def assert_identical(self, digest: str, what: str) -> None:
        """Stop unless `digest` is the same on every rank."""
        digests = self.gather(digest)
        assert len(set(digests)) == 1, f"ranks disagree about {what}: {digests}"

    def average_statistics(self, model: nn.Module) -> None:
        """Average the running statistics of batch normalisation over ranks."""
        if self.size > 1:
            self.mean_(
                [
                    buffer
                    for module in model.modules()
                    if isinstance(module, nn.modules.batchnorm._BatchNorm)
                    for buffer in module.buffers(recurse=False)
                    if buffer.is_floating_point()
                ]
            )

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def own_part(tensor: Tensor) -> Tensor:
    """What this rank has of `tensor`, in the same memory: a part of its rows, or all of it."""
    part = getattr(tensor, "to_local", None)  # of a DTensor, whose module takes long to import
    return tensor if part is None else part()


def start(device: str = "auto") -> World:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda". Each process takes the GPU of
            its local rank.

    Raises:
        UserError: when the device does not exist, a variable of the environment makes no sense, or
            process 0 cannot be reached.
    """
    # A launcher gives both. One that gives a rank alone would train as often as there are ranks.
    size = variable("WORLD_SIZE", range(1, 1 << 20), None if "RANK" in os.environ else "1")
    rank = variable("RANK", range(size), "0" if size == 1 else None)
    # All would take the first of several GPUs.
    several = size > 1 and device != "cpu" and torch.cuda.device_count() > 1
    chosen = _device(device, variable("LOCAL_RANK", range(size), None if several else "0"))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        # What ranks agree on stays on the host.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=meet(rank, size), rank=rank, world_size=size, timeout=PATIENCE
        )
    return World(rank=rank, size=size, device=chosen)


def _device(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: expected auto, cpu or cuda, got {name!r}")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if local_rank >= available:
        raise UserError(
            f"device: expected cpu, got {name}: this machine has {available} GPUs, and process "
            f"{local_rank} of it finds none"
        )
    return torch.device("cuda", local_rank)
