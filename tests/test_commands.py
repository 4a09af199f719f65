"""The commands of the README, as a user types them, at a few steps each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ["logger=none", "trainer.steps=4", "dst.interval=2", "model.dim=32", "model.depth=1",
        "model.heads=2"]  # fmt: skip


def command(*arguments: str, cwd: Path) -> str:
    """Run a Python module from an unrelated folder; its stderr."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=environment, text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_two_ranks_train_and_the_run_evaluates_to_the_same(tmp_path: Path) -> None:
    command(
        "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "padst_exp.train",
        "name=pair", *TINY, cwd=tmp_path,
    )  # fmt: skip
    summary = json.loads((tmp_path / "runs" / "pair" / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["timing"]["processes"] == 2
    assert summary["topology"]["rewires"] == 1 and not summary["permutations"]["still_soft"]
    said = command("padst_exp.evaluate", "run=runs/pair", cwd=tmp_path)
    assert f"top1 {summary['best']['top1']:.6g}" in said


@pytest.mark.slow
def test_a_sweep_leaves_one_run_for_each_combination(tmp_path: Path) -> None:
    command(
        "padst_exp.train", "-m", "structure=block,nm,diag,dense", "permutation=none,random",
        *TINY, "model.dim=64", cwd=tmp_path,
    )  # fmt: skip
    runs = [path for path in (tmp_path / "runs").iterdir() if (path / "summary.json").exists()]
    assert len(runs) == 8
