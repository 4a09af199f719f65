"""Every option of conf/dst with every option of conf/structure: it trains, or one line says why."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from dst.small_training import FEATURES, Training, start
from engine.toy import assert_equal, start_ranks
from from_yaml import from_yaml, leaf
from padst_exp.config import options
from padst_exp.engine.changes import topology_digest
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.inference.packing import harden, pack
from padst_exp.layers import sparse_weights
from padst_exp.soft import soft_choices
from padst_exp.sparsify import Rule
from padst_exp.structures import Structure

STEPS = 8
EVERY = [name for name in options("structure") if name != "dense"]
GRIDS = ["block", "butterfly", "fan_in", "nm", "shuffled_block", "unstructured"]
# Methods that make sense on some structures only; all others do on every one.
LIMITED = {
    "srigl": ["fan_in"],
    "dsb": ["shuffled_block"],
    "cht": GRIDS,
    "chts": GRIDS,
    "chtss": GRIDS,
}


def structure(name: str) -> Structure:
    """The structure of a YAML file, with units small enough for layers of 32 features."""
    small = {"size": 4, "group": 8, "stride": 8, "width": 4}
    keys = leaf(f"structure/{name}")
    found: Structure = from_yaml(
        f"structure/{name}", **{key: value for key, value in small.items() if key in keys}
    )
    return found


def training(dst: str, name: str, **changes: Any) -> Training:
    quick, call = {"interval": 2, "freeze": 0.6}, leaf(f"dst/{dst}")
    keys = {key: value for key, value in quick.items() if key in call}
    algorithm = from_yaml(f"dst/{dst}", **keys)
    settings = {"steps": STEPS, "density": 0.22, "ema_decay": 0.9}
    return start(algorithm, structure(name), **settings | changes)  # type: ignore[arg-type]


def served() -> Iterator[tuple[str, list[str]]]:
    for dst in options("dst"):
        yield dst, LIMITED.get(dst, EVERY)


def test_every_method_trains_on_every_structure_that_it_serves() -> None:
    x = torch.randn(4, FEATURES)
    for dst, names in served():
        for name in names:
            run = training(dst, name)
            losses = run.run(STEPS).state.losses
            assert len(losses) == STEPS, (dst, name)
            budgets = {}
            for key, weight in sparse_weights(run.model).items():
                topology = weight.topology()
                if dst != "srigl":  # whose neurons may lose a remainder
                    assert torch.equal(topology.counts(), weight.target), (dst, name)
                assert topology.density == pytest.approx(0.22, abs=0.07), (dst, name)
                budgets[key] = topology.num_entries
                dense = int((weight.matrix() != 0).sum())
                assert dense <= topology.num_entries, (dst, name)
            report = {row.name: row.parameters for row in run.report.layers}
            assert report == budgets, (dst, name)
            assert not soft_choices(run.model), (dst, name)
            moved = run.state.tracker.updates + len([r for r in run.rows if r["kind"] == "harden"])
            assert bool(moved) == (dst != "static"), (dst, name)
            # Exported it computes the same.
            expected = run.model.eval()(x)
            assert not harden(run.model)
            pack(run.model)
            torch.testing.assert_close(run.model(x), expected, atol=1e-4, rtol=1e-4)


def test_every_other_pair_is_refused_in_one_line() -> None:
    refused = 0
    for dst, names in served():
        for name in EVERY:
            if name in names:
                continue
            with pytest.raises(UserError) as error:
                training(dst, name)
            message = str(error.value)
            assert message.startswith("structure: expected ") and "\n" not in message
            assert f"got {type(structure(name)).__name__} (layer 0.weights.0)" in message
            refused += 1
    assert refused > 10


def test_every_method_leaves_a_dense_model_alone() -> None:
    for dst in options("dst"):
        run = training(dst, "dense")
        assert not sparse_weights(run.model)
        run.run(2)


def test_every_method_resumes_bit_by_bit() -> None:
    for dst, names in served():
        straight, broken = training(dst, names[-1]), training(dst, names[-1])
        for stop in (3, 7):  # before the freeze, and after
            broken.run(stop - broken.state.step)
            file = io.BytesIO()
            torch.save(broken.state.payload(), file)
            file.seek(0)
            broken = training(dst, names[-1], saved=torch.load(file, weights_only=True))
            assert broken.state.step == stop
        for run in (straight, broken):
            run.run(STEPS - run.state.step)
        same = {"losses": [], "random": []}  # others drew from it in between
        assert_equal(straight.state.payload() | same, broken.state.payload() | same, dst)


def on_one_rank(world: World, root: Path) -> None:
    for dst, names in served():
        run = training(dst, names[-1], world=world)
        # Other batches on each rank.
        for _ in range(world.rank):
            next(run.data)
        run.run(STEPS)
        text = topology_digest(run.model)
        (root / f"{dst}-{world.rank}").write_text(text)


def test_two_ranks_agree_on_every_topology(tmp_path: Path) -> None:
    processes = start_ranks(on_one_rank, tmp_path, ranks=2)
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    for dst in options("dst"):
        digests = {(tmp_path / f"{dst}-{rank}").read_text() for rank in (0, 1)}
        assert len(digests) == 1, dst


def test_convolutions_are_served_too() -> None:
    for dst, names in served():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 16, 3, padding=1), nn.GELU(),
            nn.Conv2d(16, 16, 1), nn.GELU(), nn.Flatten(), nn.Linear(256, 8),
        )  # fmt: skip
        run = training(dst, names[0], model=model, rules=[Rule("1"), Rule("3")], density=0.4)
        losses = run.run(8).state.losses
        assert all(loss < 10 for loss in losses), dst
        x = torch.randn(2, 2, 4, 4)
        layer = run.model[1]
        torch.testing.assert_close(
            layer(x), functional.conv2d(x, layer.weight, layer.bias, padding=1),
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip
