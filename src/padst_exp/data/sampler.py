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
from itertools import chain, repeat
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from padst_exp.data.stream import StreamReader, TextStream
from padst_exp.data.task import Address, Batch, Task
from padst_exp.errors import UserError, require
from padst_exp.seeds import seed_of
from padst_exp.signals import held, leave_to_parent

LAST_BATCH_S = 3.0
STREAM_BATCHES = 8  # kept ready, since some take longer: those that begin another group
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
        _require_even(batch_size, micro_batches, world_size)
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


class StreamSampler(Sampler[list[int]]):
    """Numbers of streams, one list for each micro-batch of each optimizer step of a rank.

    A batch has as many blocks of each stream, one stream after the other. Ranks and micro-batches
    take slices of it as in `StepSampler`; no two ranks read one stream.

    Args:
        streams: how many there are.
        batch_size: global, over all ranks and micro-batches.
        steps: optimizer steps to yield.

    Raises:
        UserError: `batch_size` does not divide evenly.
    """

    def __init__(
        self,
        *,
        streams: int,
        batch_size: int,
        micro_batches: int,
        steps: int,
        rank: int,
        world_size: int,
    ) -> None:
        _require_even(batch_size, micro_batches, world_size)
        fits = streams % world_size == 0 and batch_size % streams == 0
        wanted = f"a multiple of {world_size} processes and a divisor of trainer.batch_size="
        require(fits, "dataset.streams", streams, f"{wanted}{batch_size}")
        share, self.steps = batch_size // world_size, steps
        places = range(rank * share, (rank + 1) * share)
        numbers = [place * streams // batch_size for place in places]
        micro = share // micro_batches
        self.parts = [numbers[start : start + micro] for start in range(0, share, micro)]

    @property
    def numbers(self) -> list[int]:
        """The streams of this rank."""
        return sorted({number for part in self.parts for number in part})

    def __len__(self) -> int:
        return self.steps * len(self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        return chain.from_iterable(repeat(self.parts, self.steps))


def _require_even(batch_size: int, micro_batches: int, world_size: int) -> None:
    even = batch_size % (world_size * micro_batches) == 0
    parts = f"trainer.micro_batches={micro_batches} times {world_size} processes"
    require(even, "trainer.batch_size", batch_size, f"a multiple of {parts}")


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
    position: Tensor | None = None,
) -> Batches:
    """Yields the micro-batches of this rank in order, `micro_batches` for each optimizer step.

    Args:
        batch_size: global, over all ranks and micro-batches.
        start_step: optimizer steps already done; resuming there is exact.
        position: of this rank's part of a `TextStream` at that step, as `Batches` has it; None:
            at its beginning.
    """
    if isinstance(task.train, TextStream):
        sampled = StreamSampler(
            streams=task.train.streams,
            batch_size=batch_size,
            micro_batches=micro_batches,
            steps=max(0, total_steps - start_step),
            rank=rank,
            world_size=world_size,
        )
        reader = StreamReader(
            task.train,
            seed=seed,
            numbers=sampled.numbers,
            position=position,
        )
        return Batches(reader, sampled, workers)
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
        workers: processes that prepare batches; 0: this one does. Of a stream there is one at
            most, which has so many threads.

    Attributes:
        position: of a stream, after the batch that was yielded last; None of other data.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        addresses: Sampler[list[Address]] | Sampler[list[int]] | list[list[int]],
        workers: int,
    ) -> None:
        self.dataset, self.addresses, self.workers = dataset, addresses, workers
        self.position = dataset.position() if isinstance(dataset, StreamReader) else None

    def __len__(self) -> int:
        assert isinstance(self.addresses, Sized)
        return len(self.addresses)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Start the workers and yield what they prepare, in order. Closing it ends them.

        Raises:
            UserError: a sample cannot be read, the workers have too little shared memory, or one
                of them was killed.
        """
        streamed = self.position is not None
        loader = DataLoader(
            _Collated(self.dataset, shared=self.workers > 0),
            batch_sampler=self.addresses,
            collate_fn=_unchanged,
            num_workers=min(1, self.workers) if streamed else self.workers,
            # The threads of a tokenizer do not survive a fork.
            multiprocessing_context="spawn" if streamed and self.workers else None,
            prefetch_factor=STREAM_BATCHES if streamed and self.workers else None,
            worker_init_fn=partial(_start, self.workers) if streamed else leave_to_parent,
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
                inputs, targets, *position = batch
                if position:
                    (self.position,) = position
                yield inputs, targets
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


def _start(threads: int, worker: int) -> None:
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    leave_to_parent(worker)


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

    def __getitems__(self, addresses: list[Any]) -> tuple[Tensor, ...] | UserError:
        try:
            if hasattr(self.dataset, "__getitems__"):
                batch = self.dataset.__getitems__(addresses)
            else:
                parts = zip(*(self.dataset[address] for address in addresses), strict=True)
                batch = tuple(torch.stack(part) for part in parts)
        except UserError as error:
            return error
        if self.shared:
            try:
                batch = tuple(part.share_memory_() for part in batch)
            except RuntimeError as error:
                if not _is_memory_error(error):
                    raise
                info = get_worker_info()
                return _too_little_memory(1 if info is None else info.num_workers)
        return batch


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
