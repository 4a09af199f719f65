import errno
import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from padst_exp.engine import checkpoint
from padst_exp.engine.checkpoint import Checkpoints
from padst_exp.errors import UserError

REFUSED = r"^checkpoint: expected one that training wrote, got \S*x\.pt \("


def payload(step: int, **changes: Any) -> dict[str, Any]:
    """Of all parts, each as small as it can be but the weights."""
    empty = {"schedule", "topology", "data", "environment", "backends", "config"}
    return {
        **{name: {} for name in empty},
        **dict.fromkeys(("average", "births", "best")),
        **{name: [] for name in ("learners", "losses", "norms", "random")},
        "optimizer": {"state": {}, "param_groups": []},
        "config_text": "",
        "step": step,
        "model": {"weight": torch.full((50_000,), float(step))},
        **changes,
    }


def test_random_state_of_every_kind_survives(tmp_path: Path) -> None:
    checkpoint.write(payload(1, random=[checkpoint.random_state()]), tmp_path / "x.pt")

    def draw() -> tuple[float, float, float, float]:
        return random.random(), np.random.rand(), np.random.randn(), float(torch.rand(()))

    expected = draw()
    checkpoint.restore_random_state(checkpoint.read(tmp_path / "x.pt")["random"][0])
    assert draw() == expected


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "bad": os.system}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=REFUSED):
        checkpoint.read(tmp_path / "x.pt")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    checkpoint.write(payload(1), path)
    whole = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=REFUSED) as caught:
            checkpoint.read(path)
        assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        checkpoint.read(tmp_path / "x.pt")
    torch.save({"format": checkpoint.FORMAT + 1}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"this version reads {checkpoint.FORMAT}"):
        checkpoint.read(tmp_path / "x.pt")


def test_a_file_size_limit_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(payload(1), is_best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*last\.pt: File too large") as caught:
            checkpoints.save(payload(2), is_best=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(payload(1), is_best=False)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; earlier checkpoints are intact"):
        checkpoints.save(payload(2), is_best=False)
    assert checkpoint.read(tmp_path / "last.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_bug_is_not_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.write(payload(1), tmp_path / "x.pt")


def test_last_best_and_earlier_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.save(payload(step), is_best=step == 2, keep_last=3)
    steps = {path.name: checkpoint.read(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"last.pt": 5, "best.pt": 2, "step-000000004.pt": 4, "step-000000003.pt": 3}


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    Checkpoints(tmp_path).save(payload(3), is_best=True)
    for name in ("best.pt", "last.pt"):
        assert checkpoint.read(tmp_path / name)["step"] == 3


def test_a_kill_between_best_and_last_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(payload(1), is_best=True)
    with monkeypatch.context() as patch:
        # By then one of two files is written.
        patch.setattr(os, "link", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(payload(2), is_best=True)
    steps = {name: checkpoint.read(tmp_path / name)["step"] for name in ("best.pt", "last.pt")}
    # The one that resumes will write the other again.
    assert steps == {"best.pt": 2, "last.pt": 1}


def test_a_checkpoint_that_lacks_a_part_or_holds_another_type_is_told_by_its_part(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.pt"
    for name in checkpoint.PARTS:
        whole = payload(1)
        del whole[name]
        wrong = [] if name not in ("learners", "losses", "norms", "random") else {}
        for damaged in (whole, payload(1) | {name: wrong}, payload(1) | {name: 0.5}):
            checkpoint.write(damaged, path)
            with pytest.raises(UserError, match=rf"x\.pt: damaged, .*\b{name}\b") as caught:
                checkpoint.read(path)
            assert "\n" not in str(caught.value)
    weight = torch.tensor([1.0, torch.nan])
    for bad in (
        {"step": -1},
        {"step": True},
        {"optimizer": {"state": {}}},
        {"model": {"weight": 1}},
        {"model": {"weight": weight}},
        {"average": {"weight": weight}},
    ):
        checkpoint.write(payload(1) | bad, path)
        with pytest.raises(UserError, match=r"x\.pt: "):
            checkpoint.read(path)


def test_a_damaged_best_falls_back_to_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(payload(1), is_best=True)
    checkpoints.save(payload(2), is_best=False)
    assert checkpoint.read_best(tmp_path)[0] == checkpoints.best
    for content in (b"", b"no pickle"):
        checkpoints.best.write_bytes(content)
        path, found = checkpoint.read_best(tmp_path)
        assert path == checkpoints.last and found["step"] == 2
        assert "best.pt (" in capsys.readouterr().err
    checkpoints.last.unlink()
    with pytest.raises(UserError, match=r"best\.pt \("):
        checkpoint.read_best(tmp_path)


def test_another_configuration_is_named() -> None:
    stored = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "seed": 0}
    checkpoint.require_same_config(stored, stored | {"seed": 0}, Path("x"))
    with pytest.raises(UserError, match=r"x: .*optimizer\.lr=0\.1 there and 0\.2 here"):
        checkpoint.require_same_config(
            stored, {"optimizer": {"lr": 0.2, "betas": [0.9, 0.99]}, "seed": 0}, Path("x")
        )
