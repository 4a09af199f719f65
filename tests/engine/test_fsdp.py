"""Parameters in parts over ranks: the same training as on one, checkpoints for any number."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dst_cases import rigl
from engine.moving import Moving, Young
from engine.test_distributed import check_equal_rows, check_equal_states
from engine.toy import (
    STEPS,
    ToyTask,
    assert_same_run,
    start_ranks,
    toy_experiment,
    toy_run,
    toy_trainer,
)
from from_yaml import from_yaml
from padst_exp.dst import Constant, DropGrow, Gradient
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.engine.records import read_metrics
from padst_exp.errors import UserError

PATIENCE_S = 600


class Part(nn.Module):
    """One of several like it, with sizes that no number of ranks divides."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(36)
        self.up = nn.Linear(36, 52)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(52, 36)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.drop(nn.functional.gelu(self.up(self.norm(x)))))
        return x + y


class Tower(nn.Module):
    """A stem, like blocks, a head; a parameter of one row, and one that has two names."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, 36))
        self.stem = nn.Linear(24, 36)
        self.blocks = nn.Sequential(Part(dropout), Part(dropout))
        self.norm = nn.LayerNorm(36)
        self.norm.bias = self.stem.bias
        self.head = nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(self.stem(x) + self.shift)))
        return y


def run(
    world: World, root: Path, name: str, parallel: str, *, dropout: float = 0.0, **changes: Any
) -> Path:
    """A training in float64, in equal micro-batches on each number of ranks; its folder."""
    settings = {"checkpoint_interval": 8, **changes.pop("trainer", {})}
    trainer = toy_trainer(
        precision="float64", micro_batches=4 // world.size, parallel=parallel, **settings
    )
    torch.manual_seed(0)
    model = Tower(dropout)
    changes = {"learner": from_yaml("permutation/random")} | changes
    return toy_run(root, name=name, world=world, model=model, trainer=trainer, **changes)[1].path


def cut(world: World, root: Path, name: str, parallel: str, step: int, **changes: Any) -> None:
    """The same, but every rank fails amid a step."""
    task = ToyTask(fail_at=(step - 1) * 4 // world.size + 1)
    with suppress(ConnectionError):
        run(world, root, name, parallel, task=task, **changes)


def learned() -> dict[str, Any]:
    """Soft permutations that harden half-way."""
    return {"learner": None}


def in_parts(world: World, root: Path) -> None:
    """A straight run, and one that was cut and went on; "left" is a copy of it from before."""
    run(world, root, "straight", "fsdp", **learned())
    cut(world, root, "cut", "fsdp", 22, **learned())
    world.first(lambda: shutil.copytree(root / "cut", root / "left"))
    run(world, root, "cut", "fsdp", **learned())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave."""
    root = tmp_path_factory.mktemp("two")
    join(start_ranks(in_parts, root, ranks=2))
    return root


def join(processes: list[Any]) -> None:
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def last(path: Path) -> dict[str, Any]:
    return checkpoint.read(path / "checkpoints" / "last.pt")


def check_equal_runs(one: Path, two: Path) -> None:
    states = last(one), last(two)
    check_equal_states(*states)
    moments = [state["optimizer"]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys()
    for index, kept in moments[0].items():
        for name, value in kept.items():
            torch.testing.assert_close(moments[1][index][name], value, rtol=0, atol=1e-9)
    check_equal_rows(*(read_metrics(path / "metrics.jsonl") for path in (one, two)))


def test_a_run_in_parts_goes_on_bitwise(two: Path) -> None:
    assert_same_run(two / "straight", two / "cut")
    hardened = [
        row for row in read_metrics(two / "cut" / "metrics.jsonl") if row["kind"] == "harden"
    ]
    assert len(hardened) == 5


def test_parts_of_two_ranks_go_on_as_one_process(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends where one process ends that has done it all."""
    left = shutil.copytree(two / "left", tmp_path / "left")
    files = left / "checkpoints"
    saved = checkpoint.read_file(files / "last.pt")
    assert saved["step"] >= 16 and not any("values" in name for name in saved["model"])
    assert {path.name for path in files.iterdir()} == {"last.pt", "best.pt", *spoken_of(files)}
    whole = run(World(), tmp_path, "whole", "ddp", **learned())
    run(World(), tmp_path, "left", "fsdp", **learned())
    assert "resumed with 1 process instead of 2" in capsys.readouterr().err
    check_equal_runs(whole, left)
    # What the one process wrote is in one file again.
    assert {path.name for path in files.iterdir()} == {"last.pt", "best.pt"}


def spoken_of(folder: Path) -> set[str]:
    """The parts that checkpoints in `folder` speak of."""
    found = [checkpoint.read_file(path)["shards"]["folder"] for path in folder.glob("*.pt")]
    return set(found)


def damage(path: Path) -> None:
    (*_, folder) = sorted(path.glob("checkpoints/*.parts"))
    file = sorted(folder.iterdir())[1]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def lose(path: Path) -> None:
    (*_, folder) = sorted(path.glob("checkpoints/*.parts"))
    sorted(folder.iterdir())[0].unlink()


def elsewhere(path: Path) -> None:
    file = path / "checkpoints" / "last.pt"
    payload = checkpoint.read_file(file)
    payload["shards"] = payload["shards"] | {"folder": "../step-000000030.parts"}
    checkpoint.write(payload, file)


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (damage, r"checkpoint: expected the parts .*-model-.* in it is damaged"),
        (lose, r"checkpoint: expected the parts .* holds 1 files, not the 2 of its"),
        (elsewhere, r"last\.pt: damaged, its shards are in"),
    ],
)
def test_damaged_parts_are_refused(
    two: Path, tmp_path: Path, harm: Callable[[Path], None], line: str
) -> None:
    path = shutil.copytree(two / "straight", tmp_path / "straight")
    harm(path)
    with pytest.raises(UserError, match=line):
        last(path)


def test_what_needs_whole_parameters_is_refused() -> None:
    trainer = toy_trainer(parallel="fsdp")
    for changes, line in (
        ({"storage": "masked"}, "storage: expected packed with trainer.parallel=fsdp, got masked"),
        ({"optimizer": from_yaml("optimizer/muon", lr=0.01)}, "optimizer: .* got Muon"),
        ({"algorithm": Moving()}, "dst: .* keeps the number of entries .* got Moving"),
        (
            {"algorithm": from_yaml("dst/gmp")},
            "dst: .* got DropGrow with counts Cubic",
        ),
        (
            {"trainer": toy_trainer(parallel="fsdp", compile=True)},
            "trainer.compile: expected false",
        ),
        ({"learner": from_yaml("permutation/transport")}, "permutation: .* got Transport"),
    ):
        with pytest.raises(UserError, match=line):
            toy_experiment(**{"trainer": trainer} | changes)


class Aging(DropGrow):
    """Drops by gradients of weights and age, at a constant number of units."""

    def __init__(self) -> None:
        super().__init__(
            drop=Young(), grow=Gradient(), counts=Constant(), fraction=0.5, interval=4, stop=0.8,
            moments="age",
        )  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "learned": learned(),
    "aging": {"algorithm": Aging()},
    "momentum": {"optimizer": from_yaml("optimizer/sgd", lr=0.05)},
    "without": {"trainer": {"ema_decay": None, "clip_norm": None}},
}


def every_case(world: World, root: Path, parallel: str) -> None:
    for name, changes in CASES.items():
        run(world, root, name, parallel, **changes)
    moves = from_yaml("permutation/moves", every=1, significance=1.0, deadline=1.0)
    run(world, root, "moves", parallel, algorithm=rigl(interval=5), learner=moves)


@pytest.mark.thorough
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_case_is_the_same_in_parts(ranks: int, tmp_path: Path) -> None:
    join(start_ranks(every_case, tmp_path / "parts", "fsdp", ranks=ranks))
    every_case(World(), tmp_path / "one", "ddp")
    for name in CASES:
        check_equal_runs(tmp_path / "one" / name, tmp_path / "parts" / name)
    # It tests on parts of the samples, which are others on another number of ranks.
    join(start_ranks(every_case, tmp_path / "ddp", "ddp", ranks=ranks))
    check_equal_runs(tmp_path / "ddp" / "moves", tmp_path / "parts" / "moves")
    rows = read_metrics(tmp_path / "parts" / "moves" / "metrics.jsonl")
    assert any(row.get("moved") for row in rows)


def go_on(world: World, root: Path, name: str, parallel: str) -> None:
    run(world, root, name, parallel, **learned())


@pytest.mark.thorough
def test_any_number_of_ranks_goes_on(two: Path, tmp_path: Path) -> None:
    """From parts and from whole checkpoints, in parts and whole."""
    whole = run(World(), tmp_path, "whole", "ddp", **learned())
    for name in ("four", "two_whole"):
        shutil.copytree(two / "left", tmp_path / name)
    cut(World(), tmp_path, "from_one", "ddp", 22, **learned())
    join(start_ranks(go_on, tmp_path, "four", "fsdp", ranks=4))
    join(start_ranks(go_on, tmp_path, "two_whole", "ddp", ranks=2))
    join(start_ranks(go_on, tmp_path, "from_one", "fsdp", ranks=2))
    for name in ("four", "two_whole", "from_one"):
        check_equal_runs(whole, tmp_path / name)


def signalled(world: World, root: Path) -> None:
    """A run that gets a signal in its 14th step, on the second rank alone."""

    class Signalled(ToyTask):
        def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
            loss = super().loss(logits, targets)
            if self.losses == 27 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss

    run(world, root, "run", "fsdp", task=Signalled(), trainer={"checkpoint_interval": None})


@pytest.mark.thorough
def test_a_signal_to_one_rank_saves_the_parts_of_all(tmp_path: Path) -> None:
    processes = start_ranks(signalled, tmp_path, ranks=2)
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2
    assert last(tmp_path / "run")["step"] == 14
    run(World(), tmp_path, "run", "fsdp", trainer={"checkpoint_interval": None})
    whole = run(World(), tmp_path, "whole", "ddp", trainer={"checkpoint_interval": None})
    check_equal_runs(whole, tmp_path / "run")


def killed(world: World, root: Path, at: int) -> None:
    """A run whose first rank kills itself at one of its writes."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return write

    if at and world.main:
        for name in ("replace", "fsync", "link", "rename", "unlink", "mkdir", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
    run(world, root, "run", "fsdp", dropout=0.1, trainer={"keep_last": 2})


@pytest.mark.thorough
def test_a_run_in_parts_that_is_killed_ends_like_a_straight_one(tmp_path: Path) -> None:
    join(start_ranks(killed, tmp_path / "straight", 0, ranks=2))
    for at in (20, 33, 46):
        processes = start_ranks(killed, tmp_path / str(at), at, ranks=2)
        for process in processes:
            process.join(PATIENCE_S)
        assert processes[0].exitcode == -signal.SIGKILL and processes[1].exitcode
        join(start_ranks(killed, tmp_path / str(at), 0, ranks=2))
        folder = tmp_path / str(at) / "run"
        assert_same_run(tmp_path / "straight" / "run", folder)
        spoken = {
            checkpoint.read_file(path)["shards"]["folder"]
            for path in folder.glob("checkpoints/*.pt")
        }
        assert {path.name for path in folder.glob("checkpoints/*.parts")} == spoken
        assert not list(folder.glob("checkpoints/.*"))


def failing(world: World, root: Path) -> None:
    class Failing(ToyTask):
        def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
            if world.rank == 1 and self.losses > 30:
                raise ConnectionError("power cut")
            return super().metrics(logits, targets)

    try:
        run(world, root, "run", "fsdp", task=Failing())
    except Exception as error:
        (root / f"error{world.rank}").write_text(str(error))
        os._exit(1)  # as a process ends, connections and all


@pytest.mark.thorough
def test_an_error_of_one_rank_in_an_evaluation_ends_all(tmp_path: Path) -> None:
    processes = start_ranks(failing, tmp_path, ranks=2)
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [1, 1]
    assert (tmp_path / "error1").read_text() == "power cut"
    assert last(tmp_path / "run")["step"] == 16
    run(World(), tmp_path, "run", "fsdp")
    assert last(tmp_path / "run")["step"] == STEPS
