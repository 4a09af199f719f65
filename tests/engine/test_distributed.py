from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.moving import Moving
from engine.toy import double, start_ranks, toy_run
from from_yaml import from_yaml
from padst_exp.engine import checkpoint, distributed
from padst_exp.engine.distributed import World
from padst_exp.engine.records import read_metrics
from padst_exp.errors import UserError


def both_runs(world: World, root: Path) -> None:
    """Updates by dense gradients, all that may move does, and an optimizer that sees matrices."""
    toy_run(root, name="rigl", world=world, **double(world.size))
    toy_run(root, name="moving", world=world, algorithm=Moving(), **double(world.size))
    optimizer = from_yaml("optimizer/muon", lr=0.01)
    toy_run(root, name="muon", world=world, optimizer=optimizer, **double(world.size))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.thorough)])
def test_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    """On the same global batches in float64: changes, hardenings, metrics, checkpoints."""
    processes = start_ranks(both_runs, tmp_path / "two", ranks=ranks)
    both_runs(World(), tmp_path / "one")
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * ranks
    for name in ("rigl", "moving", "muon"):
        paths = [tmp_path / number / name for number in ("one", "two")]
        one, two = (checkpoint.read(path / "checkpoints" / "last.pt") for path in paths)
        check_equal_states(one, two)
        assert len(one["random"]) == 1 and len(two["random"]) == ranks
        rows = [read_metrics(path / "metrics.jsonl") for path in paths]
        check_equal_rows(*rows)
        kinds = [row["of"] for row in rows[0] if row["kind"] == "harden"]
        assert kinds.count("permutation") == 2 and kinds.count("selection") == (name == "moving")


def check_equal_states(one: Mapping[str, Any], two: Mapping[str, Any]) -> None:
    assert (one["average"] is None) == (two["average"] is None)
    for part in ("model", "average") if one["average"] is not None else ("model",):
        assert one[part].keys() == two[part].keys()
        for name, tensor in one[part].items():
            if tensor.is_floating_point():
                torch.testing.assert_close(two[part][name], tensor, rtol=0, atol=1e-9)
            else:
                assert torch.equal(two[part][name], tensor), name
    assert one["topology"]["replaced"] == two["topology"]["replaced"]
    assert sum(one["topology"]["replaced"].values()) > 0


def check_equal_rows(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert [(row["kind"], row["step"]) for row in one] == [
        (row["kind"], row["step"]) for row in two
    ]
    compared = {"loss", "accuracy", "loss_before", "loss_after", "grad_norm", "penalty", "density"}
    for row, other in zip(one, two, strict=True):
        for key in row.keys() & compared:
            assert other[key] == pytest.approx(row[key], abs=1e-9), row


def test_alone_nothing_is_communicated() -> None:
    world = World()
    tensor = torch.ones(2)
    world.mean_([tensor])
    world.assert_identical("x", "anything")
    assert torch.equal(tensor, torch.ones(2)) and world.gather(3) == [3]
    assert world.from_main("x") == "x" and world.largest(2) == 2
    assert world.first(lambda: 5) == 5


def test_devices_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="device: expected auto, cpu or cuda, got 'tpu'"):
        distributed.start("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: expected cpu, got cuda: this machine has"):
        distributed.start("cuda")
