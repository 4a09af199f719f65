"""Trainings killed at any moment end, once resumed, as if nothing had been, and leave nothing.

`make kills` runs more of them than every change can wait for.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.toy import STEPS, ToyTask, assert_same_run, start_ranks, toy_run, toy_trainer
from padst_exp.cache import cached, cached_array
from padst_exp.engine.distributed import World
from padst_exp.engine.records import read_metrics

KILLS = int(os.environ.get("KILLS", "2"))
WRITES = ("replace", "fsync", "link", "rename", "unlink", "mkdir")
PIECES = 6


class CachedTask(ToyTask):
    """Prepares its data at first use, and keeps them."""

    def __init__(self, between: Callable[[], None]) -> None:
        super().__init__()

        def pieces() -> Iterator[NDArray[np.int32]]:
            for part in self.train.inputs.numpy().view(np.int32).reshape(PIECES, -1):
                between()
                yield part & 0x7FFFFFFF

        kept = cached_array("toy", pieces, below=2**31)
        scale = cached("scale", lambda: "0.5", float)
        values = torch.from_numpy(kept.copy()).view(torch.float32).view_as(self.train.inputs)
        self.train.inputs = values * scale


def train(world: World, root: Path, workers: int, kill_at: int, kill_in: str) -> None:
    """A run in a group of its own that kills itself at the n-th write or piece, if n > 0."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)
    os.environ["PADST_CACHE"] = str(root / "cache")
    count = 0

    def count_down() -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **options: Any) -> Any:
            count_down()
            result = call(*arguments, **options)
            count_down()
            return result

        return write

    if kill_in == "write" and world.main:
        for name in WRITES:
            setattr(os, name, counted(getattr(os, name)))
    between = count_down if kill_in == "piece" else lambda: None
    # As for a data set: rank 0 prepares, the others find.
    task = world.first(lambda: CachedTask(between)) or CachedTask(lambda: None)
    toy_run(root, world=world, task=task, trainer=toy_trainer(workers=workers))


def processes_of(groups: list[int]) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(group) in groups and state not in "ZX":
            found.append(path.parent.name)
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run of so many ranks that nobody disturbs."""
    known: dict[int, Path] = {}

    def folder(ranks: int) -> Path:
        if ranks not in known:
            root = tmp_path_factory.mktemp(f"straight{ranks}")
            finish(root, ranks, 0)
            known[ranks] = root / "toy"
        return known[ranks]

    return folder


def finish(root: Path, ranks: int, workers: int) -> None:
    processes = start_ranks(train, root, workers, 0, "", ranks=ranks)
    try:
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_training_ends_like_a_straight_one(
    number: int, tmp_path: Path, straight: Callable[[int], Path]
) -> None:
    draw = random.Random(number)
    moment = ("write", "piece", "any")[number % 3]
    ranks, workers = 1 + draw.randrange(2), 2 * draw.randrange(2)
    last = {"write": 150, "piece": PIECES, "any": 0}[moment]
    kill_at = draw.randint(1, last) if last else 0
    processes = start_ranks(train, tmp_path, workers, kill_at, moment, ranks=ranks)
    if moment == "any":
        row, victim = draw.randrange(STEPS // 2), draw.choice(processes)
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "toy" / "metrics.jsonl")) < row and victim.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.05 * draw.random())
        victim.kill()
    else:
        processes[0].join(120)
    # As a launcher does with the peers of a process that died.
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(10)
        process.kill()
        process.join()
    groups = [process.pid for process in processes]
    deadline = time.monotonic() + 5
    while processes_of(groups):
        assert time.monotonic() < deadline, processes_of(groups)
        time.sleep(0.01)

    finish(tmp_path, ranks, workers)
    assert_same_run(straight(ranks), tmp_path / "toy")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert not (tmp_path / "toy" / "lock.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "toy"}
