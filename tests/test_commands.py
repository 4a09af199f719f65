"""The commands of the README, as a user types them, at a few steps each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.toy import assert_same_run
from padst_exp.engine.records import read_metrics

ROOT = Path(__file__).parents[1]
TINY = ["logger=none", "model.dim=32", "model.depth=1", "model.heads=2"]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Run a Python module from an unrelated folder."""
    path = os.pathsep.join(str(ROOT / part) for part in ("src", "kernels"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it said, once it succeeded."""
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_a_killed_run_equals_a_straight_one_and_evaluates_to_the_same(tmp_path: Path) -> None:
    train = [
        *("padst_exp.train", *TINY, "device=cpu", "resume=auto", "trainer.steps=40"),
        *("trainer.log_interval=2", "trainer.checkpoint_interval=3", "trainer.eval_interval=20"),
        *("trainer.ema_decay=0.9", "dst.interval=10", "permutation.interval=10"),
    ]
    finish(start(*train, "name=straight", cwd=tmp_path))
    straight, killed = tmp_path / "runs" / "straight", tmp_path / "runs" / "killed"
    process = start(*train, "name=killed", cwd=tmp_path)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        rows = read_metrics(killed / "metrics.jsonl")
        if rows and rows[-1]["step"] >= 16:
            break
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "summary.json").exists()
    assert "resumed at step" in finish(start(*train, "name=killed", cwd=tmp_path))
    assert_same_run(straight, killed)

    summary = json.loads((killed / "summary.json").read_text())
    assert summary["permutations"]["hardened"] == 4 and summary["topology"]["updates"] == 2
    said = finish(start("padst_exp.evaluate", "run=runs/killed", "device=cpu", cwd=tmp_path))
    assert f"top1 {summary['best']['ema_top1']:.6g}" in said


@pytest.mark.slow
def test_two_ranks_train(tmp_path: Path) -> None:
    launcher = ("torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m")
    steps = ("trainer.steps=4", "dst.interval=2", "permutation.interval=2")
    finish(start(*launcher, "padst_exp.train", "name=pair", *TINY, *steps, cwd=tmp_path))
    summary = json.loads((tmp_path / "runs" / "pair" / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["timing"]["processes"] == 2
    assert summary["topology"]["updates"] == 1 and not summary["permutations"]["still_soft"]


@pytest.mark.slow
def test_a_sweep_leaves_one_run_for_each_combination(tmp_path: Path) -> None:
    sweep = ("-m", "structure=nm,dense", "permutation=none,random")
    finish(start("padst_exp.train", *sweep, *TINY, "trainer.steps=2", cwd=tmp_path))
    runs = [path for path in (tmp_path / "runs").iterdir() if (path / "summary.json").exists()]
    assert len(runs) == 4
