"""The weights of a checkpoint are checked before anything computes with them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hostile import DAMAGED, broken_states, undone
from padst_exp.analyze import AnalyzeSchema, analyze
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.engine.records import read_metrics
from padst_exp.errors import UserError
from padst_exp.restore import restore_run


@pytest.fixture
def run(real_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(real_run, tmp_path / "run"))


def refused(path: Path, what: str) -> str:
    with pytest.raises(UserError) as error:
        restore_run(path, World())
    line = str(error.value)
    assert "\n" not in line and len(line) < 600, (what, line)
    return line


def test_no_broken_weights_load(run: Path) -> None:
    (run / "checkpoints" / "best.pt").unlink()
    path = run / "checkpoints" / "last.pt"
    payload = checkpoint.read(path)
    for what, state in broken_states(payload["model"]):
        checkpoint.write({**payload, "model": state}, path)
        refused(run, what)
    checkpoint.write(payload, path)
    restore_run(run, World())


def test_no_checkpoint_without_its_parts_loads(run: Path) -> None:
    (run / "checkpoints" / "best.pt").unlink()
    path = run / "checkpoints" / "last.pt"
    payload = checkpoint.read(path)
    wrong: dict[str, tuple[Any, ...]] = {
        "step": (None, -1, 2.0, "3", True, torch.tensor(3)),
        "model": (None, 5, [], {"x": 1}, {}, {1: torch.zeros(2)}, torch.zeros(3)),
        "average": ({}, 5, [1]),
    }
    for key, values in wrong.items():
        checkpoint.write({name: value for name, value in payload.items() if name != key}, path)
        refused(run, f"no {key}")
        for value in values:
            checkpoint.write({**payload, key: value}, path)
            refused(run, f"{key}={value}")
    # What only says how fast backends were is measured again.
    for value in ({}, {"device": 1}, {"device": "x", "picks": 5}):
        checkpoint.write({**payload, "backends": value}, path)
        restore_run(run, World())
    for whole in (None, 5, [], {}, {"format": 99}, torch.zeros(3)):
        torch.save(whole, path)
        refused(run, f"{whole}")


def test_no_damaged_file_of_a_run_is_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, best, last = (
        run / name for name in ("config.yaml", "checkpoints/best.pt", "checkpoints/last.pt")
    )
    sound = last.read_bytes()
    for what, damage in DAMAGED.items():
        # The last one stands in for the best one, and a line says so.
        damage(best)
        capsys.readouterr()
        assert restore_run(run, World()).path == last
        assert ("best.pt" in capsys.readouterr().err) == (what != "missing")
        damage(last)
        assert str(last.parent) in refused(run, f"last.pt is {what}")
        undone(last, sound)
        undone(best, sound)
    sound = config.read_bytes()
    for what, damage in DAMAGED.items():
        # What a checkpoint says of itself stands in for the config.
        damage(config)
        capsys.readouterr()
        assert restore_run(run, World()).path == best
        said = capsys.readouterr().err
        assert what in ("a little short", "flipped bytes") or str(config) in said, what
        undone(config, sound)


def test_metrics_that_are_none_cost_a_line_or_nothing(run: Path) -> None:
    """They are read for pictures and for people."""
    file = run / "metrics.jsonl"
    sound = file.read_bytes()
    rows = len(read_metrics(file))
    for what, damage in DAMAGED.items():
        damage(file)
        if what in ("a folder", "a pipe", "no end", "a pointer of Git LFS"):
            with pytest.raises(UserError, match=r"^run: expected the metrics of a run, got "):
                read_metrics(file)
        else:
            assert len(read_metrics(file)) <= rows, what
        undone(file, sound)
    strange = ('{"step": 1}', '{"step": "1", "kind": "eval"}', '{"kind": "rewire"}', "[1]", "NaN")
    odd = '{"kind": "rewire", "step": 3, "churn": "x", "density": [1]}'
    file.write_text("\n".join((*strange, odd)))
    assert [row.get("churn") for row in read_metrics(file)] == [None, "x"]
    keys = AnalyzeSchema(
        run=str(run), out=None, parts=("topology",), device="cpu", trust=(), changes=()
    )
    assert analyze(keys, World())[1]["topology"]["changes"] == []
