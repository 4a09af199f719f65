"""What a resume may change, what it may not, and what it makes of damaged files."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from engine.toy import (
    STEPS,
    Samples,
    ToyTask,
    assert_equal,
    assert_same_run,
    start_ranks,
    timeless,
    toy_run,
    toy_trainer,
)
from padst_exp.data.text import TextFile
from padst_exp.engine import checkpoint, loop
from padst_exp.engine.distributed import World
from padst_exp.engine.records import read_metrics
from padst_exp.errors import UserError


def cut(root: Path, **changes: Any) -> Path:
    """The folder of a run that failed amid step 14."""
    with pytest.raises(ConnectionError):
        toy_run(root, task=ToyTask(fail_at=27), **changes)
    return root / "toy"


def resized(training: int, validation: int) -> ToyTask:
    task = ToyTask()
    task.train, task.validation = Samples(training, 1), Samples(validation, 2)
    return task


def test_what_changes_no_weight_may_change(tmp_path: Path) -> None:
    _, straight, _ = toy_run(tmp_path, name="straight")
    cut(tmp_path)
    changes = {"workers": 1, "log_interval": 1, "checkpoint_interval": 2, "eval_interval": 15}
    trainer = toy_trainer(**changes, eval_batch_size=3, keep_last=2)
    _, resumed, _ = toy_run(tmp_path, trainer=trainer)
    one, other = (checkpoint.read(d.checkpoints.last) for d in (straight, resumed))
    for part in ("model", "average", "optimizer", "topology", "random"):
        assert_equal(one[part], other[part], part)


def test_other_data_are_refused_with_their_counts(tmp_path: Path) -> None:
    path = cut(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in path.glob("checkpoints/*")}
    for task in (resized(95, 40), resized(96, 39)):
        counts = f"{len(task.train)} training and {len(task.validation)} validation"
        with pytest.raises(UserError, match=f"other data than before, 96 .* 40 .* and {counts}"):
            toy_run(tmp_path, task=task)
    assert {file: file.stat().st_mtime_ns for file in path.glob("checkpoints/*")} == before
    assert not (path / "lock.json").exists()


def test_equal_counts_do_not_make_equal_data(tmp_path: Path) -> None:
    described = []
    for name, text in (("a", "one two three " * 40), ("b", "one two there " * 40)):
        (tmp_path / name).write_text(text)
        task = TextFile(
            path=str(tmp_path / name), validation_fraction=0.5, vocab_size=256, context_length=4
        )
        described.append(task.describe())
    assert described[0]["training"] == described[1]["training"]
    assert described[0] != described[1]


def ranks_apart(world: World, root: Path) -> None:
    try:
        toy_run(root, world=world, task=resized(96 - world.rank, 40))
    except UserError as error:
        root.mkdir(exist_ok=True)
        (root / f"error{world.rank}").write_text(str(error))


@pytest.mark.slow
def test_ranks_that_see_different_data_are_refused_before_the_first_step(tmp_path: Path) -> None:
    for process in start_ranks(ranks_apart, tmp_path / "runs", ranks=2):
        process.join(60)
        assert process.exitcode == 0
    lines = [path.read_text() for path in sorted((tmp_path / "runs").iterdir())]
    assert len(lines) == 2  # and no run directory
    assert all("96 training" in line and "95 training" in line for line in lines)


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.batch_size"):
        toy_run(tmp_path, trainer=toy_trainer(batch_size=15))
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    class Second(ToyTask):
        tried = False

        def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
            if self.losses == 3 and not self.tried:
                self.tried = True
                used = pytest.raises(UserError, match=f"in use by process {os.getpid()} on host")
                with torch.random.fork_rng(), used:
                    toy_run(tmp_path)
            return super().loss(logits, targets)

    torch.manual_seed(0)
    _, directory, _ = toy_run(tmp_path, task=Second(), dropout=0.0)
    toy_run(tmp_path, name="straight", dropout=0.0)
    assert_same_run(tmp_path / "straight", directory.path)
    assert not (directory.path / "lock.json").exists()


def test_two_equal_runs_have_equal_checkpoints(tmp_path: Path) -> None:
    paths = []
    for name in ("one", "two"):
        torch.manual_seed(len(name))
        _, directory, _ = toy_run(tmp_path, name=name, backend="torch")
        paths.append(directory.path)
    assert_same_run(*paths)


def test_damaged_files_are_mended_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_run(tmp_path, name="straight")
    cut(tmp_path / "cut")

    def empty(path: Path) -> None:
        path.write_bytes(b"")

    def halve(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def noise(path: Path) -> None:
        path.write_bytes(b"\xff\xfe[1, 2")

    def list_(path: Path) -> None:
        path.write_text("[1, 2]\n")

    def dangling(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.with_name("nowhere"))

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    for damage in (empty, halve, noise, list_, dangling, folder):
        for name in ("config.yaml", "metrics.jsonl", "checkpoints/last.pt"):
            root = tmp_path / f"{damage.__name__}-{Path(name).stem}"
            shutil.copytree(tmp_path / "cut", root)
            damage(root / "toy" / name)
            try:
                toy_run(root)
            except UserError as error:
                assert str(root / "toy") in str(error) and "\n" not in str(error)
                # Half a config may be a whole one of another run.
                assert (
                    damage is folder
                    or name.endswith(".pt")
                    or (damage, name)
                    == (
                        halve,
                        "config.yaml",
                    )
                )
                continue
            assert name != "checkpoints/last.pt"
            weights = [
                checkpoint.read(path / "checkpoints" / "last.pt")["model"]
                for path in (tmp_path / "straight", root / "toy")
            ]
            assert_equal(*weights, name)
            if name == "config.yaml":
                assert yaml.safe_load((root / "toy" / name).read_text())["optimizer"]["lr"] == 0.01
                assert_same_run(tmp_path / "straight", root / "toy")
        # A summary that is none is written again.
        root = tmp_path / f"{damage.__name__}-summary"
        shutil.copytree(tmp_path / "straight", root / "toy")
        damage(root / "toy" / "summary.json")
        if damage is folder:
            with pytest.raises(IsADirectoryError):
                toy_run(root)
            continue
        toy_run(root)
        assert_same_run(tmp_path / "straight", root / "toy")


def test_a_checkpoint_damaged_in_its_depth_is_refused_by_its_part(tmp_path: Path) -> None:
    last = cut(tmp_path) / "checkpoints" / "last.pt"
    whole = checkpoint.read(last)
    group = whole["optimizer"]["param_groups"][0]
    state = whole["optimizer"]["state"]
    other = {key: torch.zeros(3) for key in state[0]}
    for part, damaged in (
        ("optimizer", {"state": {}, "param_groups": []}),
        ("optimizer", {"state": {0: 5}, "param_groups": [group]}),
        ("optimizer", {"state": {**state, 0: other}, "param_groups": [group]}),
        ("optimizer", {"state": state, "param_groups": [{"params": group["params"]}]}),
        ("schedule", {}),
        ("topology", {}),
        ("topology", {**whole["topology"], "seen": {}}),
        ("topology", {**whole["topology"], "updates": "four"}),
        ("learners", []),
        ("learners", [{}]),
        ("random", [{}]),
        ("random", [{**whole["random"][0], "torch": torch.zeros(3)}]),
        ("random", [3]),
        ("best", ("high", 10)),
        ("losses", ["low"]),
        ("norms", [None]),
        ("backends", {}),
        ("backends", {"picks": 3}),
    ):
        checkpoint.write({**whole, part: damaged}, last)
        with pytest.raises(UserError, match=rf"last\.pt: damaged, its {part} ") as caught:
            toy_run(tmp_path)
        assert "\n" not in str(caught.value), part
    checkpoint.write(whole, last)
    toy_run(tmp_path)


def test_leftovers_of_the_killed_are_removed(tmp_path: Path) -> None:
    path = cut(tmp_path)
    for left in (path / ".metrics.jsonl.x.tmp", path / "checkpoints" / ".last.pt.0123.tmp"):
        left.write_bytes(b"half")
    toy_run(tmp_path)
    assert not list(path.rglob(".*"))


class Blind(ToyTask):
    """Its validation says NaN from the second evaluation on."""

    evaluations = 0

    def summarize(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        self.evaluations += 1
        worth = 0.5 if self.evaluations == 1 else math.nan
        return {"loss": worth, "accuracy": worth}


def test_nan_in_validation_is_valid_json_and_told_at_the_end(tmp_path: Path) -> None:
    trainer = toy_trainer(ema_decay=None, eval_interval=8)
    summary, directory, _ = toy_run(tmp_path, task=Blind(), trainer=trainer)
    assert summary["best"]["step"] == 8
    assert summary["not_finite"] == ["loss", "accuracy"]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (directory.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    json.loads((directory.path / "summary.json").read_text(), parse_constant=refuse)
    rows = [row for row in read_metrics(directory.path / "metrics.jsonl") if row["kind"] == "eval"]
    assert [math.isnan(row["accuracy"]) for row in rows] == [False, True, True, True]
    again, _, _ = toy_run(tmp_path, task=Blind(), trainer=trainer)
    assert again["final"]["accuracy"] is None and again["not_finite"] == ["loss", "accuracy"]


def test_nan_is_never_the_best_and_nothing_is_worse(tmp_path: Path) -> None:
    class Late(Blind):
        def summarize(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
            self.evaluations += 1
            worth = {1: math.nan, 2: 0.25}.get(self.evaluations, 0.125)
            return {"loss": worth, "accuracy": worth}

    summary, directory, _ = toy_run(
        tmp_path, task=Late(), trainer=toy_trainer(ema_decay=None, eval_interval=10)
    )
    assert summary["best"]["accuracy"] == 0.25
    assert checkpoint.read(directory.checkpoints.best)["step"] == 20


def test_another_machine_goes_on_and_says_that_it_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_run(tmp_path, name="straight")
    path = cut(tmp_path)
    shutil.copytree(path, tmp_path / "same" / "toy")
    capsys.readouterr()
    toy_run(tmp_path / "same")
    assert "bitwise" not in capsys.readouterr().err
    numerics = loop.numerics
    monkeypatch.setattr(loop, "numerics", lambda device: numerics(device) | {"threads": 9})
    toy_run(tmp_path)
    said = capsys.readouterr().err
    assert "resumed with threads 9 for 1: the rest is no longer bitwise equal" in said
    assert timeless(read_metrics(tmp_path / "straight" / "metrics.jsonl")) == timeless(
        read_metrics(path / "metrics.jsonl")
    )
    assert read_metrics(path / "metrics.jsonl")[-1]["step"] == STEPS
