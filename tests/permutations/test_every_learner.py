"""Every option of conf/permutation through the engine: it trains, ends hard, resumes, exports."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dst.small_training import FEATURES, Training, start
from engine.toy import assert_equal, start_ranks
from from_yaml import from_yaml, leaf
from padst_exp.config import options
from padst_exp.engine.changes import topology_digest
from padst_exp.engine.distributed import World
from padst_exp.inference.packing import harden, pack
from padst_exp.layers import permutations, sparse_weights
from padst_exp.permutations import is_bijection
from padst_exp.soft import soft_choices
from padst_exp.sparsify import Rule

STEPS = 12
LEARNERS = options("permutation")
# Quick enough for so short a training: whichever of these keys a learner has.
QUICK: dict[str, Any] = {"side": "both", "interval": 2, "deadline": 0.6, "group": 5, "start": 0.0}


def training(name: str, structure: str = "block", **changes: Any) -> Training:
    keys = leaf(f"permutation/{name}")
    quick = QUICK | ({"side": "in"} if name == "transport" else {})
    learner = from_yaml(f"permutation/{name}", **{k: v for k, v in quick.items() if k in keys})
    cut: dict[str, Any] = {"block": {"size": 4}, "diag": {"bundle": 1}, "fan_in": {"group": 8}}
    settings = {"steps": STEPS, "density": 0.3, "ema_decay": 0.9, "learner": learner}
    algorithm = changes.pop("algorithm", None) or from_yaml("dst/rigl", interval=3)
    built = from_yaml(f"structure/{structure}", **cut[structure])
    return start(algorithm, built, **settings | changes)


def resumed(run: Training, name: str) -> Training:
    file = io.BytesIO()
    torch.save(run.state.payload(), file)
    file.seek(0)
    return training(name, saved=torch.load(file, weights_only=True))


@pytest.mark.parametrize("name", LEARNERS)
def test_it_trains_ends_hard_and_exports_what_it_computes(name: str) -> None:
    x = torch.randn(4, FEATURES)
    for structure in ("block", "diag", "fan_in"):
        run = training(name, structure).run(STEPS)
        assert not soft_choices(run.model), structure
        assert all(is_bijection(p.index) for p in permutations(run.model).values())
        for weight in sparse_weights(run.model).values():
            assert torch.equal(weight.topology().counts(), weight.target), structure
        average = run.state.average
        assert average is not None
        ours, theirs = permutations(run.model), permutations(average.model)
        assert all(torch.equal(ours[key].index, theirs[key].index) for key in ours)
        expected = run.model.eval()(x)
        assert not harden(run.model)
        pack(run.model)
        torch.testing.assert_close(run.model(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LEARNERS)
def test_packed_trains_as_masked_does(name: str) -> None:
    packed, masked = (training(name, storage=s).run(STEPS) for s in ("packed", "masked"))  # type: ignore[arg-type]
    losses = torch.tensor(packed.state.losses), torch.tensor(masked.state.losses)
    torch.testing.assert_close(*losses, atol=1e-4, rtol=0)
    assert topology_digest(packed.model) == topology_digest(masked.model)


@pytest.mark.parametrize("name", LEARNERS)
def test_it_resumes_bit_by_bit(name: str) -> None:
    straight, broken = training(name), training(name)
    for stop in (3, 5, 10):  # while soft, between two exchanges, once hard
        broken = resumed(broken.run(stop - broken.state.step), name)
    for run in (straight, broken):
        run.run(STEPS - run.state.step)
    same = {"losses": [], "random": []}
    assert_equal(straight.state.payload() | same, broken.state.payload() | same, name)


def on_one_rank(world: World, root: Path) -> None:
    for name in LEARNERS:
        run = training(name, world=world)
        for _ in range(world.rank):  # other batches on each rank
            next(run.data)
        run.run(STEPS)
        (root / f"{name}-{world.rank}").write_text(topology_digest(run.model))


def test_two_ranks_agree_on_every_permutation(tmp_path: Path) -> None:
    processes = start_ranks(on_one_rank, tmp_path, ranks=2)
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    for name in LEARNERS:
        assert len({(tmp_path / f"{name}-{rank}").read_text() for rank in (0, 1)}) == 1, name


def test_channels_of_convolutions_are_permuted_too() -> None:
    for name in LEARNERS:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 16, 3, padding=1), nn.GELU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(256, 8),
        )  # fmt: skip
        run = training(name, model=model, rules=[Rule("3")])
        losses = run.run(STEPS).state.losses
        assert all(loss < 10 for loss in losses), name
        layer, x = run.model[3], torch.randn(2, 16, 4, 4)
        wanted = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)


def test_permutations_are_learned_where_topologies_never_change() -> None:
    for dst in (from_yaml("dst/static"), from_yaml("dst/rigl", stop=0.0)):
        for name in LEARNERS:
            if name == "moves" and type(dst).__name__ == "Static":
                continue  # refused: it moves when topologies change
            run = training(name, algorithm=dst).run(STEPS)
            assert not soft_choices(run.model), name
