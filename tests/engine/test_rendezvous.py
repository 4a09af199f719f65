"""What a launcher says of the processes of a run, checked before anybody waits for the others."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from padst_exp.engine import checkpoint, distributed, rendezvous
from padst_exp.errors import UserError

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def refusal(monkeypatch: pytest.MonkeyPatch, given: Mapping[str, str], device: str = "cpu") -> str:
    for name in (*NAMES, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        distributed.start(device)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_variables_that_make_no_sense_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {"WORLD_SIZE": "2", "RANK": "1"}
    there = {**pair, "MASTER_ADDR": "localhost"}
    cases: list[tuple[Mapping[str, str], str]] = [
        *(({"WORLD_SIZE": value}, "WORLD_SIZE: ") for value in ("abc", "0", "-1", "", "1.0", "²")),
        *(
            ({"RANK": value}, "WORLD_SIZE: expected a whole number from")
            for value in ("0", "1", "x")
        ),
        *(({"RANK": value, "WORLD_SIZE": "1"}, "RANK: ") for value in ("1", "-1", "x")),
        ({"WORLD_SIZE": "2"}, "RANK: expected a whole number from 0 to 1 in the environment, got "),
        ({**pair, "RANK": "2"}, "RANK: "),
        ({**pair, "LOCAL_RANK": "2"}, "LOCAL_RANK: "),
        (pair, "MASTER_ADDR: expected the host of process 0 in the environment, got nothing"),
        *(({**there, "MASTER_PORT": value}, "MASTER_PORT: ") for value in ("0", "65536", "x")),
        (there, "MASTER_PORT: "),
    ]
    for given, message in cases:
        assert refusal(monkeypatch, given).startswith(message), given


def test_a_port_in_use_and_a_silent_host_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "SECONDS_TO_REACH", 0)
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = str(taken.getsockname()[1])
        pair = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # Bound, but listening to nobody.
        said = refusal(monkeypatch, {**pair, "RANK": "1"})
        assert said.startswith("MASTER_ADDR: expected the host of process 0")
        taken.listen()
        assert refusal(monkeypatch, {**pair, "RANK": "0"}).startswith("MASTER_PORT: expected a fr")


def test_several_gpus_need_a_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    pair = {"WORLD_SIZE": "2", "RANK": "1"}
    said = refusal(monkeypatch, pair, device="auto")
    assert said.startswith(
        "LOCAL_RANK: expected a whole number from 0 to 1 in the environment, got"
    )
    assert refusal(monkeypatch, pair).startswith("MASTER_ADDR: ")  # on the CPU it is not needed


def test_who_never_comes_and_who_counts_otherwise_end_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "SECONDS_TO_GATHER", 1)
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    given = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    wanted = (
        f"MASTER_ADDR: expected a place where all 2 processes meet, got 127.0.0.1:{port}, where"
    )
    assert refusal(monkeypatch, given).startswith(wanted)
    for others in ([2], [3], [2, 3]):
        store = HashStore()
        ranks = [(0, 1 + len(others)), *enumerate(others, 1)]
        with ThreadPoolExecutor() as pool:
            work = [pool.submit(rendezvous._require_same_size, store, *rank) for rank in ranks]
        errors = [str(one.exception() or "") for one in work]
        first, alike = ranks[0][1], all(size == ranks[0][1] for _, size in ranks)
        for error, (rank, size) in zip(errors, ranks, strict=True):
            refused = size != first or (rank == 0 and not alike)
            assert bool(error) == refused, (error, rank, size)
            assert not error or error.startswith(f"WORLD_SIZE: expected {first}, as in process 0")


@pytest.mark.thorough
def test_ranks_find_each_other_by_their_variables_alone(tmp_path: Path) -> None:
    """As srun starts them: no launcher sets anything, or ends the others."""
    with socket.socket() as free:
        free.bind(("", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    small = "model.dim=16 model.depth=1 model.heads=2 trainer.epochs=null trainer.steps=3"
    command = [sys.executable, "-m", "padst_exp.train", *small.split(), "backend=torch"]
    command += ["logger=none", "device=cpu", f"runs={tmp_path}", "name=run"]
    cases: list[tuple[list[dict[str, str]], list[int], str]] = [
        ([{"WORLD_SIZE": "3"}, {"WORLD_SIZE": "2"}], [1, 1], "WORLD_SIZE: expected 2, as in"),
        ([{}, {}], [0, 0], "results in "),
    ]
    for others, statuses, line in cases:
        processes = []
        for rank, other in zip((1, 0), others, strict=True):
            given = {"RANK": str(rank), "WORLD_SIZE": "2", **place, **other}
            environment = {**os.environ, **given, "PYTHONPATH": os.pathsep.join(sys.path)}
            processes.append(
                subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            )
        try:
            said = [process.communicate(timeout=120)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == statuses, said
        assert line in "".join(said) and "Traceback" not in "".join(said)
    assert len(checkpoint.read(tmp_path / "run" / "checkpoints" / "last.pt")["random"]) == 2


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    world = distributed.start("cpu")
    assert (world.rank, world.size, os.environ.get("MASTER_ADDR")) == (0, 1, None)
