import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.toy import timeless
from padst_exp.engine import checkpoint
from padst_exp.engine.run_directory import read_metrics

ROOT = Path(__file__).parents[2]
# Rewirings every 10 steps, all hardenings among them, a checkpoint in every 3rd step.
OVERRIDES = (
    "model.dim=32",
    "model.depth=2",
    "model.heads=2",
    "trainer.steps=80",
    "trainer.checkpoint_interval=3",
    "trainer.log_interval=2",
    "trainer.eval_interval=20",
    "trainer.ema_decay=0.9",
    "dst.interval=10",
    "logger=none",
    "device=cpu",
    "resume=auto",
)


def start(runs: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "padst_exp.train", *OVERRIDES, f"runs={runs}", f"name={name}"]
    path = os.pathsep.join(str(ROOT / part) for part in ("src", "kernels"))
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=runs,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    return error


def wait_for_step(process: subprocess.Popen[str], path: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        rows = read_metrics(path / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.005)
    pytest.fail(f"never got to step {step}")


def last_step(path: Path) -> Any:
    return checkpoint.read(path / "checkpoints" / "last.pt")["step"]


@pytest.mark.slow
def test_a_run_killed_three_times_equals_a_straight_one(tmp_path: Path) -> None:
    finish(start(tmp_path, "straight"))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for step in (6, 31, 62):
        process = start(tmp_path, "killed")
        wait_for_step(process, killed, step)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not (killed / "summary.json").exists()
        assert step - 5 <= last_step(killed) < 80
    assert "resumed at step" in finish(start(tmp_path, "killed"))

    assert timeless(read_metrics(straight / "metrics.jsonl")) == timeless(
        read_metrics(killed / "metrics.jsonl")
    )
    one, two = (json.loads((path / "summary.json").read_text()) for path in (straight, killed))
    assert timeless(one) == timeless(two)
    assert one["permutations"]["hardened"] > 0 and one["topology"]["rewires"] > 3
    for part in ("model", "average"):
        weights = [
            checkpoint.read(path / "checkpoints" / "last.pt")[part] for path in (straight, killed)
        ]
        for name, tensor in weights[0].items():
            assert torch.equal(tensor, weights[1][name]), name
    # A finished run is not repeated.
    summary = (killed / "summary.json").stat().st_mtime_ns
    finish(start(tmp_path, "killed"))
    assert (killed / "summary.json").stat().st_mtime_ns == summary
