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


def payload(step: int) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((50_000,), float(step))}


def test_random_state_of_every_kind_survives(tmp_path: Path) -> None:
    checkpoint.write(checkpoint.random_state(), tmp_path / "x.pt")

    def draw() -> tuple[float, float, float, float]:
        return random.random(), np.random.rand(), np.random.randn(), float(torch.rand(()))

    expected = draw()
    checkpoint.restore_random_state(checkpoint.read(tmp_path / "x.pt"))
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


def test_what_a_kill_left_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / ".last.pt.0123.tmp").write_bytes(b"half a checkpoint")
    Checkpoints(tmp_path).save(payload(3), is_best=True)
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "last.pt"}


def test_another_configuration_is_named() -> None:
    stored = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "seed": 0}
    checkpoint.require_same_config(stored, stored | {"seed": 0}, Path("x"))
    with pytest.raises(UserError, match=r"x: .*optimizer\.lr=0\.1 there and 0\.2 here"):
        checkpoint.require_same_config(
            stored, {"optimizer": {"lr": 0.2, "betas": [0.9, 0.99]}, "seed": 0}, Path("x")
        )
