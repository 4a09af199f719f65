import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from from_yaml import from_yaml
from padst_exp.data.sampler import StepSampler, train_loader, validation_loader
from padst_exp.data.synthetic import SyntheticTokens
from padst_exp.data.task import Address, Batch
from padst_exp.errors import UserError


def joined(batches: list[list[Address]]) -> list[Address]:
    return list(itertools.chain.from_iterable(batches))


def drawn(
    *,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    total: int = 9,
    length: int = 50,
    batch_size: int = 12,
    micro_batches: int = 1,
    seed: int = 3,
    repeats: int = 1,
) -> list[list[Address]]:
    sampler = StepSampler(
        length=length,
        batch_size=batch_size,
        micro_batches=micro_batches,
        start_step=start,
        total_steps=total,
        seed=seed,
        rank=rank,
        world_size=world_size,
        repeats=repeats,
    )
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def test_the_ranks_together_draw_the_batch_of_one() -> None:
    for world_size in (2, 3):
        ranks = [drawn(rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [joined(list(parts)) for parts in zip(*ranks, strict=True)] == drawn()


def test_micro_batches_cut_a_batch_in_order() -> None:
    parts = drawn(micro_batches=3)
    assert {len(part) for part in parts} == {4}
    assert [joined(parts[i : i + 3]) for i in range(0, len(parts), 3)] == drawn()


def test_resuming_is_exact_within_and_across_epochs() -> None:
    for start in (1, 4, 7):  # 4 steps an epoch
        assert drawn(start=start) == drawn()[start:]


def test_an_epoch_draws_every_sample_once_and_another_in_another_order() -> None:
    batches = drawn(length=48, total=8)
    first, second = joined(batches[:4]), joined(batches[4:])
    assert sorted(first) == [(0, index) for index in range(48)]
    assert sorted(second) == [(1, index) for index in range(48)]
    assert [index for _, index in first] != [index for _, index in second]


def test_the_seed_changes_the_order() -> None:
    assert drawn(seed=0) != drawn(seed=1)


def test_repeats_give_each_sample_several_times_under_distinct_epochs() -> None:
    batches = drawn(repeats=3, total=8)
    for batch in batches:
        assert len({index for _, index in batch}) == 4
    everything = joined(batches)
    assert len(set(everything)) == len(everything)


def test_a_batch_that_does_not_divide_names_its_key() -> None:
    message = (
        r"^trainer\.batch_size: expected a multiple of trainer\.micro_batches=3 times 2 .*, got 8$"
    )
    with pytest.raises(UserError, match=message):
        drawn(batch_size=8, micro_batches=3, world_size=2)


def tokens(samples: int = 10) -> SyntheticTokens:
    task: SyntheticTokens = from_yaml(
        "dataset/synthetic_tokens", vocab_size=10, context_length=3, samples=samples, pool=10
    )
    return task


def counting(samples: int) -> SyntheticTokens:
    """A task whose validation samples are numbers."""
    task = tokens()
    task.validation = TensorDataset(torch.arange(samples), torch.arange(samples))
    return task


def test_validation_sees_every_sample_once() -> None:
    for world_size, batch_size in ((1, 5), (3, 2), (5, 100)):
        seen: list[int] = []
        for rank in range(world_size):
            loader = validation_loader(
                counting(13), batch_size=batch_size, rank=rank, world_size=world_size, workers=0
            )
            seen += itertools.chain.from_iterable(inputs.tolist() for inputs, _ in loader)
        assert seen == list(range(13))


def test_validation_allows_ranks_without_samples() -> None:
    sizes = [
        len(list(validation_loader(counting(1), batch_size=4, rank=rank, world_size=2, workers=0)))
        for rank in (0, 1)
    ]
    assert sorted(sizes) == [0, 1]


def tokens_drawn(task: SyntheticTokens, workers: int = 0, start: int = 0) -> list[Batch]:
    loader = train_loader(
        task,
        batch_size=4,
        micro_batches=2,
        start_step=start,
        total_steps=5,
        seed=0,
        rank=0,
        world_size=1,
        workers=workers,
    )
    return list(loader)


def flat(batches: list[Batch]) -> Tensor:
    return torch.cat([torch.cat([inputs, targets]) for inputs, targets in batches])


def test_the_loader_agrees_with_workers_and_after_resuming() -> None:
    task = tokens()
    straight = tokens_drawn(task)
    assert len(straight) == 10
    assert straight[0][0].shape == (2, 3)
    assert torch.equal(flat(tokens_drawn(task, workers=2)), flat(straight))
    assert torch.equal(flat(tokens_drawn(task, start=3)), flat(straight[6:]))


def test_loading_leaves_the_global_generator_alone() -> None:
    task = tokens()
    before = torch.get_rng_state()
    tokens_drawn(task)
    list(validation_loader(task, batch_size=100, rank=0, world_size=1, workers=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_loaders_of_one_task_keep_their_seeds() -> None:
    task = tokens()
    tokens_drawn(task)
    assert task.train.seed == 0
    loaders = [
        train_loader(
            task,
            batch_size=4,
            micro_batches=1,
            start_step=0,
            total_steps=1,
            seed=seed,
            rank=0,
            world_size=1,
            workers=0,
        )
        for seed in (1, 2)
    ]
    assert [loader.dataset.seed for loader in loaders] == [1, 2]


def test_too_little_shared_memory_is_told_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As torch says it where /dev/shm is full; forked workers inherit what is set here.
    def full(tensor: Tensor) -> Tensor:
        raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    assert len(tokens_drawn(tokens())) == 10
    for workers in (1, 2):
        with pytest.raises(
            UserError, match=rf"^trainer\.workers: expected 0, .* got {workers} with"
        ):
            tokens_drawn(tokens(), workers=workers)


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs a mount of its own",
)
@pytest.mark.parametrize(
    "method",
    ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))],
)
def test_a_small_dev_shm_ends_within_a_minute(method: str) -> None:
    program = """
import multiprocessing, sys
import torch
from padst_exp.data.sampler import Batches
from padst_exp.errors import UserError
multiprocessing.set_start_method(sys.argv[1])
data = torch.utils.data.TensorDataset(torch.zeros(9, 3, 99, 99), torch.zeros(9))
try:
    print(len(list(Batches(data, [[index] * 4 for index in range(9)], 2))))
except UserError as error:
    print(error)
"""
    cases = {"200k": "trainer.workers: "}
    if method == "fork":
        cases |= {"64m": "9\n", "4k": "trainer.workers: "}
    for size, expected in cases.items():
        mounted = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
        command = [
            "unshare",
            "-rm",
            "sh",
            "-c",
            mounted,
            "sh",
            sys.executable,
            "-c",
            program,
            method,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.startswith(expected), done.stderr
        assert done.stdout.count("\n") == 1
