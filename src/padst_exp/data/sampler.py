"""Which samples make which optimizer step: a function of the seed and the step, nothing else."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from padst_exp.data.task import Address, Batch, Task
from padst_exp.errors import require
from padst_exp.seeds import seed_of


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
) -> DataLoader[Batch]:
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
    return _loader(dataset, sampler, task, workers)


def validation_loader(
    task: Task, *, batch_size: int, rank: int, world_size: int, workers: int
) -> DataLoader[Batch]:
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
    return _loader(task.validation, batches, task, workers)


def _loader(
    dataset: Dataset[Batch], batches: Iterable[list[Any]], task: Task, workers: int
) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=task.collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Without one of its own, a loader draws from the global generator at every epoch,
        # and a resumed run would part from a straight one.
        generator=torch.Generator(),
    )
