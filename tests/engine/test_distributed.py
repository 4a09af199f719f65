import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.toy import timeless, toy_run, toy_trainer
from padst_exp.engine import checkpoint, distributed
from padst_exp.engine.distributed import World
from padst_exp.engine.run_directory import read_metrics
from padst_exp.errors import UserError

ROOT = Path(__file__).parents[2]


def run_ranks(folder: Path, ranks: int) -> None:
    """Start the toy training in `ranks` processes and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("src", "kernels", "tests")),
    }
    script = str(Path(__file__).with_name("one_rank.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(folder)],
            stderr=subprocess.PIPE,
            text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """With four rewirings and two hardenings, in float64, on the same global batches."""
    run_ranks(tmp_path / "two", 2)
    toy_run(
        tmp_path / "one", trainer=toy_trainer(precision="float64", micro_batches=4), dropout=0.0
    )
    one, two = tmp_path / "one" / "toy", tmp_path / "two" / "toy"
    first, second = (checkpoint.read(path / "checkpoints" / "last.pt") for path in (one, two))
    for part in ("model", "average"):
        for name, tensor in first[part].items():
            if tensor.is_floating_point():
                torch.testing.assert_close(second[part][name], tensor, rtol=0, atol=1e-9)
            else:
                assert torch.equal(second[part][name], tensor), name
    assert first["topology"]["replaced"] == second["topology"]["replaced"]
    rows = [timeless(read_metrics(path / "metrics.jsonl")) for path in (one, two)]
    assert [(row["kind"], row["step"]) for row in rows[0]] == [
        (row["kind"], row["step"]) for row in rows[1]
    ]
    for row, other in zip(*rows, strict=True):
        for key in row.keys() & {"loss", "accuracy", "loss_before", "loss_after", "grad_norm"}:
            assert other[key] == pytest.approx(row[key], abs=1e-9), row
    assert len(second["random"]) == 2


def test_alone_nothing_is_communicated() -> None:
    world = World()
    tensor = torch.ones(2)
    world.mean_([tensor])
    world.assert_identical("x", "anything")
    assert torch.equal(tensor, torch.ones(2)) and world.gather(3) == [3]
    assert world.from_main("x") == "x" and not world.any(False)


def test_devices_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="device: expected auto, cpu or cuda, got 'tpu'"):
        distributed.start("tpu")
    monkeypatch.setenv("LOCAL_RANK", "999")
    with pytest.raises(UserError, match="device: expected cpu, got cuda: this machine has"):
        distributed.start("cuda")
