"""A sweep: what is there is not run again, what fails and what came out is told at its end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from padst_exp import identity
from padst_exp.config import GROUPS
from padst_exp.errors import UserError
from padst_exp.sweeps import Job, local
from padst_exp.sweeps.local import Pool
from padst_exp.sweeps.sweep import Sweep

TINY = (
    "logger=none", "device=cpu", "backend=torch", "model.depth=1", "model.dim=32", "model.heads=2",
    "trainer.batch_size=8", "trainer.eval_interval=null", "structure=nm",
)  # fmt: skip
ROOT = Path(__file__).parents[2]


class Fake:
    """Stands for Hydra and a launcher: a run is a folder with a summary of its seed."""

    def __init__(self, root: Path, failing: Sequence[int] = ()) -> None:
        self.root, self.failing = root, failing
        self.launched: list[list[str]] = []
        choices = dict.fromkeys(("model", "structure", "dst", "permutation"), "x")
        self.base = {
            **dict.fromkeys(("init_from", "init_topology", "init_permutation", "init_values")),
            **dict.fromkeys(("name", "arm")),
            **{group: {} for group in GROUPS},
            "sparse": [], "sparsity": 0.9, "distribution": "uniform", "low_rank": 0, "seed": 0,
            "storage": "packed", "init_score": "magnitude", "init_batches": 1, "scale": "demo",
            "resume": "never", "runs": str(root), "device": "cpu", "backend": "auto",
            "hydra": {"runtime": {"choices": {**choices, "experiment": "trial"}}},
        }  # fmt: skip

    def load(self, overrides: list[str]) -> DictConfig:
        cfg = OmegaConf.create(self.base)
        cfg.merge_with_dotlist([override.replace('"', "") for override in overrides])
        return cfg

    def launch(self, overrides: list[list[str]], first: int) -> list[str | None]:
        self.launched += overrides
        for number, each in enumerate(overrides, first):
            if number not in self.failing:
                folder = self.sweep.numbered[number].runs / self.sweep.numbered[number].name
                folder.mkdir(exist_ok=True)
                (folder / "config.yaml").touch()
                final = {"monitor": "top1", "final": {"top1": float(self.load(each).seed)}}
                (folder / "summary.json").write_text(json.dumps(final))
        end = first + len(overrides)
        return ["of no use" if number in self.failing else None for number in range(first, end)]

    def run(self, *jobs: Job) -> None:
        self.launched = []
        self.sweep = Sweep(jobs, load=self.load, launch=self.launch)
        self.sweep.run()

    def rows(self) -> list[dict[str, Any]]:
        path = self.root / "sweeps" / "trial.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


def job(arm: str, seed: int, **starts_from: Job) -> Job:
    return Job(arm, {}, [f"arm={arm}", f"sparsity=0.{len(arm)}", f"seed={seed}"], starts_from)


def test_only_what_is_not_finished_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(tmp_path, failing=[1])
    jobs = [job("abc", 1), job("abcd", 2), job("cba", 1)]  # the last is the first again
    with pytest.raises(UserError, match=r"^1 jobs of this sweep failed: 1$"):
        fake.run(*jobs)
    assert [each[2] for each in fake.launched] == ["seed=1", "seed=2"]
    assert all(each[-1] == "resume=auto" for each in fake.launched)
    said = capsys.readouterr().err
    assert "arm=cba seed=1   top1 1 " in said and "arm=abcd seed=2  not finished" in said
    fake.failing = []
    fake.run(*jobs)
    assert [each[2] for each in fake.launched] == ["seed=2"]
    fake.run(*jobs)
    assert not fake.launched
    again = Job("abc", {}, [*job("abc", 1).overrides, "resume=never"])
    fake.run(again)
    assert len(fake.launched) == 1
    # What belongs together is told in one file, also of runs that are made for several arms.
    rows = fake.rows()
    assert {row["arm"] for row in rows if row["run"] == rows[0]["run"]} == {"abc", "cba"}
    assert rows[0]["replicate"] == rows[2]["replicate"] != rows[1]["replicate"]


def test_what_a_run_starts_from_is_run_before(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.run(job("ab", 3, init_permutation=job("abc", 4)), job("abcd", 3))
    assert [each[0] for each in fake.launched] == ["arm=abcd", "arm=abc", "arm=ab"]
    (start,) = [word for word in fake.launched[2] if word.startswith("init_permutation=")]
    source = Path(start.partition("=")[2].strip('"'))
    assert source.parent == tmp_path and (source / "summary.json").exists()
    # It is a means, not a run of this sweep.
    assert {row["arm"] for row in fake.rows()} == {"ab", "abcd"}


def test_replicates_differ_in_their_seed_and_in_where_it_starts_from() -> None:
    run = {"seed": 0, "init_permutation": "runs/a-seed0", "scale": "demo", "dst": {"stop": 0.5}}
    other = {"seed": 1, "init_permutation": "runs/a-seed1", "scale": "small", "dst": {"stop": 0.5}}
    assert identity.replicate_hash(run) == identity.replicate_hash(other)
    assert identity.name_hash(run) != identity.name_hash(other)
    assert identity.replicate_hash(run) != identity.replicate_hash({**run, "dst": {"stop": 0.4}})


def test_a_name_would_be_that_of_all_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^name: expected null in a sweep, got one$"):
        Fake(tmp_path).run(Job(None, {}, ["name=one"]))


def pool(folder: Path, size: int, gpus: Sequence[str] = ()) -> Pool:
    return Pool(size=size, gpus=gpus, logs=folder, label=str, outcome=lambda number: "fine")


PROGRAMS = """
import os, signal, sys, time
from pathlib import Path

def main():
    name, folder = sys.argv[1:]
    if name == "meet":
        (Path(folder) / ("gpu" + os.environ["CUDA_VISIBLE_DEVICES"])).touch(exist_ok=False)
        while len(list(Path(folder).glob("gpu*"))) < 2:
            time.sleep(0.01)
    if name == "mistake":
        print("padst_exp: error: k: expected 1, got 2")
        raise SystemExit(1)
    if name == "killed":
        os.kill(os.getpid(), 9)
    if name == "sleep":
        signal.signal(signal.SIGUSR1, lambda *a: os._exit(99))
        (Path(folder) / "begun").touch()
        time.sleep(60)
"""


def test_processes_run_side_by_side_and_fail_each_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs.py"
    programs.write_text(PROGRAMS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(local, "IMPORTED", [])
    commands = [["programs", name, str(tmp_path)] for name in ("meet", "meet", "mistake", "killed")]
    ended = pool(tmp_path, 2, ["3", "5"]).run(commands, first=7)
    assert ended == [None, None, "k: expected 1, got 2", "ended by SIGKILL"]
    assert (tmp_path / "gpu3").exists() and (tmp_path / "gpu5").exists()
    said = capsys.readouterr().err
    assert "9 failed: k: expected 1, got 2" in said and "7: fine" in said
    assert "2 of 4 done, 0 running, 2 failed" in said


def test_the_program_of_a_sweep_is_not_begun_anew_in_its_runs(tmp_path: Path) -> None:
    (tmp_path / "programs.py").write_text("def main(): print('ran')")
    program = tmp_path / "program.py"
    program.write_text(f"""
print("begun", __name__, flush=True)
if __name__ == "__main__":
    from pathlib import Path
    from padst_exp.sweeps import local
    local.IMPORTED = []
    pool = local.Pool(size=1, gpus=[], logs=Path({str(tmp_path)!r}), label=str, outcome=str)
    assert pool.run([["programs"]]) == [None]
""")
    done = subprocess.run([sys.executable, program], env=environment(), capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"begun __main__\n"), done.stderr
    assert (tmp_path / "0.log").read_text() == "ran\n"


def test_who_asks_a_sweep_to_end_asks_its_runs(tmp_path: Path) -> None:
    """They save their work; what waits is not begun, and the sweep ends as they do."""
    (tmp_path / "programs.py").write_text(PROGRAMS)
    code = f"""
from pathlib import Path
from padst_exp.sweeps import local
local.IMPORTED = []
pool = local.Pool(size=1, gpus=[], logs=Path({str(tmp_path)!r}), label=str, outcome=str)
pool.run([["programs", "sleep", {str(tmp_path)!r}]] * 2)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment())
    wait_for((tmp_path / "begun").exists)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 99
    assert [path.name for path in tmp_path.glob("*.log")] == ["0.log"]


def environment() -> dict[str, str]:
    paths = [str(ROOT / "src"), str(ROOT / "kernels"), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def wait_for(condition: Callable[[], object], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "padst_exp.train", "-m", *TINY, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), text=True, stderr=subprocess.PIPE
    )


def metrics(folder: Path) -> dict[str, Any]:
    summaries = (folder / "runs").glob("*/summary.json")
    return {path.parent.name: json.loads(path.read_text())["final"] for path in summaries}


@pytest.mark.thorough
def test_a_sweep_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path) -> None:
    sweep = ("seed=0,1", "permutation=none,doubly_stochastic", "trainer.steps=60",
             "trainer.checkpoint_interval=10", "hydra.launcher.n_jobs=2")  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    process = start(straight, *sweep)
    assert process.communicate(timeout=600) and process.returncode == 0
    assert len(metrics(straight)) == 4
    drawn = random.Random(0)
    for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start(killed, *sweep)
        before = len(list(killed.glob("runs/*/metrics.jsonl")))
        wait_for(lambda: len(list(killed.glob("runs/*/metrics.jsonl"))) > min(before, 3) or  # noqa: B023
                 process.poll() is not None)  # noqa: B023  # fmt: skip
        time.sleep(drawn.uniform(0, 2))
        process.send_signal(signum)
        process.communicate()
        wait_for(lambda: not list(killed.glob("runs/*/lock.json")))
    process = start(killed, *sweep)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    assert metrics(killed) == metrics(straight)
    # And once more there is nothing to do, but to say so.
    process = start(killed, *sweep)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0 and "4 of 4 runs finished before" in said
    assert said.count("top1 ") == 4


@pytest.mark.thorough
def test_a_job_of_a_cluster_goes_back_into_the_queue_when_warned(tmp_path: Path) -> None:
    sweep = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=60",
             "trainer.steps=300", "trainer.log_interval=1")  # fmt: skip
    # One process that hears a signal submitit does not know; one of two that work together.
    for signum, tasks in ((signal.SIGUSR1, 1), (signal.SIGUSR2, 2)):
        folder = tmp_path / str(tasks)
        folder.mkdir()
        process = start(folder, *sweep, f"hydra.launcher.tasks_per_node={tasks}")

        def rows(folder: Path = folder) -> list[Path]:
            found = folder.glob("runs/*/metrics.jsonl")
            return [path for path in found if path.stat().st_size > 2000]

        wait_for(rows)
        run = rows()[0].parent
        os.kill(json.loads((run / "lock.json").read_text())["process"], signum)
        said = process.communicate(timeout=900)[1]
        assert process.returncode == 0, said
        assert (run / "env-resume-1.json").exists()
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["steps"], summary["timing"]["processes"]) == (300, tasks)


@pytest.mark.thorough
def test_a_failed_job_of_a_cluster_does_not_stop_the_others(tmp_path: Path) -> None:
    process = start(tmp_path, "hydra/launcher=submitit_local", "trainer.steps=2",
                    "structure.n=0,1")  # fmt: skip
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 1 and said.endswith("1 jobs of this sweep failed: 0\n")
    assert len(metrics(tmp_path)) == 1
