"""Which samples make which optimizer step: a function of the seed and the step, nothing else."""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from padst_exp.data.task import Address, Batch, Task
from padst_exp.errors import UserError, require
from padst_exp.seeds import seed_of
from padst_exp.signals import held, leave_to_parent

LAST_BATCH_S = 3.0
SHARED_MEMORY = "/dev/shm"


class StepSampler(Sampler[list[Address]]):
    """Addresses of one rank, one list for each micro-batch of each optimizer step.

    Step t of an epoch takes positions [t * batch_size, (t + 1) * batch_size) of a permutation
    seeded by (seed, epoch); what is left of an epoch below one batch is dropped. The ranks take
    contiguous slices of the batch, the micro-batches contiguous slices of those. With `repeats`,
    position p stands for sample p // repeats of the permutation, each repeat under an epoch number
    of its own, so that an epoch keeps its number of steps (Hoffer et al. 2020, as in DeiT).

    Args:
        length: samples in the data set.
        batch_size: global, over all ranks and micro-batches; at most `length`.
        start_step, total_steps: optimizer steps, of the run, to yield: [start_step, total_steps).

    Raises:
        UserError: `batch_size` does not divide evenly.
    """

    def __init__(
        self,
        *,
        length: int,
        batch_size: int,
        micro_batches: int,
        start_step: int,
        total_steps: int,
        seed: int,
        rank: int,
        world_size: int,
        repeats: int = 1,
    ) -> None:
        even = batch_size % (world_size * micro_batches) == 0
        parts = f"trainer.micro_batches={micro_batches} times {world_size} processes"
        require(even, "trainer.batch_size", batch_size, f"a multiple of {parts}")
        assert 1 <= batch_size <= length  # the trainer has looked
        self.length, self.batch_size, self.micro_batches = length, batch_size, micro_batches
        self.start_step, self.total_steps = start_step, total_steps
        self.seed, self.rank, self.world_size, self.repeats = seed, rank, world_size, repeats

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[Address]]:
        steps_per_epoch = self.length // self.batch_size
        share = self.batch_size // self.world_size
        micro = share // self.micro_batches
        current, permutation = -1, torch.empty(0)
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != current:
                current, permutation = epoch, self._permutation(epoch)
            first = position * self.batch_size + self.rank * share
            for start in range(first, first + share, micro):
                yield self._addresses(permutation, epoch, start, start + micro)

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
        return torch.randperm(self.length, generator=generator)

    def _addresses(self, permutation: Tensor, epoch: int, start: int, stop: int) -> list[Address]:
        if self.repeats == 1:
            return [(epoch, index) for index in permutation[start:stop].tolist()]
        positions = torch.arange(start, stop)
        epochs = epoch * self.repeats + positions % self.repeats
        indices = permutation[positions // self.repeats]
        return list(zip(epochs.tolist(), indices.tolist(), strict=True))


def train_loader(
    task: Task,
    *,
    batch_size: int,
    micro_batches: int,
    start_step: int,
    total_steps: int,
    seed: int,
    rank: int,
    world_size: int,
    workers: int,
) -> Batches:
    """Yields the micro-batches of this rank in order, `micro_batches` for each optimizer step.

    Args:
        batch_size: global, over all ranks and micro-batches.
        start_step: optimizer steps already done; resuming there is exact.
    """
    # A copy, so that two loaders of one task keep their own seeds.
    dataset = copy.copy(task.train)
    dataset.seed = seed
    sampler = StepSampler(
        length=len(dataset),
        batch_size=batch_size,
        micro_batches=micro_batches,
        start_step=start_step,
        total_steps=total_steps,
        seed=seed,
        rank=rank,
        world_size=world_size,
        repeats=task.repeats,
    )
    return Batches(dataset, sampler, workers)


def validation_loader(
    task: Task, *, batch_size: int, rank: int, world_size: int, workers: int
) -> Batches:
    """Yields each validation sample once over all ranks, in order and without padding.

    The ranks' numbers of batches differ by one at most, and a rank may have none: synchronise
    after the loop, not inside.

    Args:
        batch_size: of this rank.
    """
    length = len(task.validation)
    stop = (rank + 1) * length // world_size
    starts = range(rank * length // world_size, stop, batch_size)
    batches = [list(range(start, min(start + batch_size, stop))) for start in starts]
    return Batches(task.validation, batches, workers)


class Batches:
    """Iterates over batches; what goes wrong in a data worker is raised here in one line.

    Args:
        dataset: map-style.
        addresses: of the samples of each batch.
        workers: processes that prepare batches; 0: this one does.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        addresses: Sampler[list[Address]] | list[list[int]],
        workers: int,
    ) -> None:
        self.dataset, self.addresses, self.workers = dataset, addresses, workers

    def __len__(self) -> int:
        assert isinstance(self.addresses, Sized)
        return len(self.addresses)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Start the workers and yield what they prepare, in order. Closing it ends them.

        Raises:
            UserError: a sample cannot be read, the workers have too little shared memory, or one
                of them was killed.
        """
        loader = DataLoader(
            _Collated(self.dataset, shared=self.workers > 0),
            batch_sampler=self.addresses,
            collate_fn=_unchanged,
            num_workers=self.workers,
            worker_init_fn=leave_to_parent,
            pin_memory=torch.cuda.is_available(),
            # Without one of its own, a loader draws from the global generator at every epoch,
            # and a resumed run would part from a straight one.
            generator=torch.Generator(),
        )
        batches: Any = None
        before = set(multiprocessing.active_children())
        workers: list[BaseProcess] = []
        kill = partial(_kill, workers)
        # Where nobody closes this, the interpreter would wait for them for ever at its end.
        atexit.register(kill)
        try:
            # They leave signals to this process, from the beginning.
            with held(), _quiet_children():
                batches = iter(loader)
            workers += [w for w in multiprocessing.active_children() if w not in before]
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (OSError, RuntimeError, EOFError) as error:
            if _is_memory_error(error):
                raise _too_little_memory(self.workers) from error
            _require_alive(workers, error)
            raise
        finally:
            # They end by themselves, but not before the batch that they are at.
            timer = threading.Timer(LAST_BATCH_S, kill)
            timer.start()
            if workers:
                batches._shutdown_workers()
            timer.cancel()
            kill()
            atexit.unregister(kill)


@contextmanager
def _quiet_children() -> Iterator[None]:
    """A block that may start data workers, whose deaths are told by the next batch asked for.

    torch tells them by an exception wherever this process is, amid an optimizer step too.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGCHLD, before)


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _require_alive(processes: list[BaseProcess], error: Exception) -> None:
    """Raise a `UserError` if a data worker was killed."""
    # What it was sending breaks off before it is known to have ended: later on a busy machine.
    broken = isinstance(error, EOFError | ConnectionError)
    patient_until = time.monotonic() + (LAST_BATCH_S if broken else 1)
    while time.monotonic() < patient_until:
        for process in processes:
            if process.exitcode is not None and process.exitcode < 0:
                name = signal.Signals(-process.exitcode).name
                raise UserError(
                    f"trainer.workers: expected processes that live, got one ended by {name}, as "
                    "where memory is short"
                ) from error
        time.sleep(0.02)


class _Collated(Dataset[Any]):
    """A data set whose items are whole batches, or the `UserError` met when making one.

    An exception that leaves a worker arrives with the traceback in its message; a returned one
    arrives as it is.

    Args:
        shared: whether batches go to another process. They are moved to shared memory here, where
            a lack of it can be told: the queue would lose the batch, and its reader wait for ever.
    """

    def __init__(self, dataset: Any, *, shared: bool) -> None:
        self.dataset, self.shared = dataset, shared

    def __getitems__(self, addresses: list[Any]) -> Batch | UserError:
        try:
            if hasattr(self.dataset, "__getitems__"):
                inputs, targets = self.dataset.__getitems__(addresses)
            else:
                parts = zip(*(self.dataset[address] for address in addresses), strict=True)
                inputs, targets = (torch.stack(part) for part in parts)
        except UserError as error:
            return error
        if self.shared:
            try:
                inputs, targets = inputs.share_memory_(), targets.share_memory_()
            except RuntimeError as error:
                if not _is_memory_error(error):
                    raise
                info = get_worker_info()
                return _too_little_memory(1 if info is None else info.num_workers)
        return inputs, targets


def _unchanged(batch: Any) -> Any:
    return batch


def _is_memory_error(error: Exception) -> bool:
    text = str(error)
    return any(sign in text for sign in ("No space left", "shared memory", "Bus error", "shm"))


def _too_little_memory(workers: int) -> UserError:
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    return UserError(
        f"trainer.workers: expected 0, or more shared memory (docker run --shm-size=8g), got "
        f"{workers} with {free / 2**20:.1f} MiB free in {SHARED_MEMORY}"
    )
