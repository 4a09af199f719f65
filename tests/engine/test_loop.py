import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from engine.toy import (
    STEPS,
    ToyTask,
    timeless,
    toy_learner,
    toy_model,
    toy_run,
    toy_trainer,
)
from padst_exp import dispatch
from padst_exp.dispatch import Choice
from padst_exp.engine import checkpoint
from padst_exp.engine.backends import choose_backends, describe
from padst_exp.engine.distributed import World
from padst_exp.engine.interruption import Interrupted
from padst_exp.engine.run_directory import RunDirectory, read_metrics
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear, permutations

MICRO_BATCHES = 2


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    summary, directory, _ = toy_run(tmp_path_factory.mktemp("straight"))
    return summary, directory.path


def assert_same_run(one: Path, other: Path) -> None:
    """Everything but times is equal, bit by bit: metrics, summary, all that a checkpoint holds."""
    assert timeless(read_metrics(one / "metrics.jsonl")) == timeless(
        read_metrics(other / "metrics.jsonl")
    )
    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, other)]
    assert timeless(summaries[0]) == timeless(summaries[1])
    for name in ("last.pt", "best.pt"):
        first, second = (checkpoint.read(path / "checkpoints" / name) for path in (one, other))
        assert_equal(first, second, name)


def assert_equal(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for position, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}.{position}")
    else:
        assert one == other, where


def test_a_run_learns_and_leaves_its_files(straight: tuple[dict[str, Any], Path]) -> None:
    summary, path = straight
    kinds = [row["kind"] for row in read_metrics(path / "metrics.jsonl")]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "train": STEPS / 3,
        "eval": 3,
        "rewire": 4,
        "permutation": 4,  # beside every row of training until they harden at step 15
        "harden": 2,
    }
    for name in ("summary.json", "curves.png", "topology.png"):
        assert (path / name).stat().st_size > 100
    assert summary["steps"] == STEPS and summary["final"]["accuracy"] > 0.4
    assert summary["topology"]["rewires"] == 4
    assert summary["topology"]["explored"] > summary["density_of_layers"]
    assert summary["permutations"]["hardened"] == 2 and not summary["permutations"]["still_soft"]
    assert summary["baselines"] == {"chance accuracy": 0.25}


# A rewiring, a hardening, a checkpoint (4), rows of metrics (3) and evaluations (10) in between.
@pytest.mark.parametrize("cut", [2, 5, 7, 11, 15, 16, 17, 21, 30])
def test_a_resumed_run_equals_a_straight_one(
    tmp_path: Path, straight: tuple[dict[str, Any], Path], cut: int
) -> None:
    with pytest.raises(ConnectionError):
        toy_run(tmp_path, task=ToyTask(fail_at=MICRO_BATCHES * cut))
    torch.manual_seed(12345)
    _, directory, _ = toy_run(tmp_path)
    assert_same_run(straight[1], directory.path)


def test_a_resumed_run_computes_with_the_backends_it_began_with(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        toy_run(tmp_path, task=ToyTask(fail_at=MICRO_BATCHES * 7))
    last = tmp_path / "toy" / "checkpoints" / "last.pt"
    payload = checkpoint.read(last)
    assert payload["backends"]["choices"]
    for choice in payload["backends"]["choices"].values():
        choice["backend"] = "dense"
    checkpoint.write(payload, last)
    summary, _, model = toy_run(tmp_path)
    assert {row["backend"] for row in summary["backends"].values()} == {"dense"}
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert {product.backend for layer in layers for product in layer.parts()} == {"dense"}


def test_a_backend_asked_for_wins_over_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        toy_run(tmp_path, task=ToyTask(fail_at=MICRO_BATCHES * 7), backend="dense")
    with pytest.raises(ConnectionError):
        toy_run(tmp_path, task=ToyTask(fail_at=MICRO_BATCHES * 3))
    payload = checkpoint.read(tmp_path / "toy" / "checkpoints" / "last.pt")
    choices = payload["backends"]["choices"].values()
    assert {choice["backend"] for choice in choices} == {"dense"}
    summary, _, _ = toy_run(tmp_path, backend="torch")
    assert {row["backend"] for row in summary["backends"].values()} == {"torch"}


def test_rank_0_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = toy_learner()
    arguments: dict[str, Any] = {"task": ToyTask(), "trainer": toy_trainer(), "backend": "auto"}
    model, _ = toy_model(learner, 0.0)
    decided = choose_backends(model, world=World(), saved=None, **arguments)
    dense = {name: replace(choice, backend="dense") for name, choice in decided.items()}
    # What another rank receives counts, whatever its own device would have chosen.
    monkeypatch.setattr(World, "from_main", lambda self, value: dense if value is None else value)
    monkeypatch.setattr(dispatch, "restore", lambda *_: 1 / 0)
    monkeypatch.setattr(dispatch, "choose", lambda *_, **__: 1 / 0)
    model, _ = toy_model(learner, 0.0)
    saved = dispatch.save(decided, torch.device("cpu"))
    assert choose_backends(model, world=World(1, 2), saved=saved, **arguments) == dense
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert {product.backend for layer in layers for product in layer.parts()} == {"dense"}


def test_layers_slower_than_dense_are_not_hidden_behind_fast_ones() -> None:
    fast = Choice("torch", 8, "float32", {"torch": 1.0, "reference": 4.0})
    slow = Choice("torch", 8, "float32", {"torch": 2.0, "reference": 1.0})
    unknown = Choice("dense", 0, "", {})
    choices = {"a": fast, "b": fast, "c": slow, "d": unknown}
    assert describe(choices) == (
        "sparse products, forward and backward: 3 by torch (4.00x dense), 1 of them slower than "
        "dense (down to 0.50x), 1 by dense"
    )


def test_a_kill_before_the_summary(
    tmp_path: Path, straight: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toy_run(tmp_path)
    _, directory, _ = toy_run(tmp_path)
    assert_same_run(straight[1], directory.path)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(
    tmp_path: Path,
    straight: tuple[dict[str, Any], Path],
    signum: int,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Signalled(ToyTask):
        def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if self.losses == MICRO_BATCHES * 13:
                os.kill(os.getpid(), signum)
            return super().loss(logits, targets)

    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught:
        toy_run(tmp_path, task=Signalled(), trainer=toy_trainer(checkpoint_interval=None))
    assert caught.value.code == status
    assert signal.getsignal(signum) == before
    assert "interrupted at step 14" in capsys.readouterr().err
    assert checkpoint.read(tmp_path / "toy" / "checkpoints" / "last.pt")["step"] == 14
    _, directory, _ = toy_run(tmp_path, trainer=toy_trainer(checkpoint_interval=None))
    assert timeless(read_metrics(straight[1] / "metrics.jsonl")) == timeless(
        read_metrics(directory.path / "metrics.jsonl")
    )


# 15 is the deadline of the permutations: they must not harden to what a NaN made of them.
@pytest.mark.parametrize("step", [3, 11, 15])
def test_a_nan_stops_the_run(tmp_path: Path, step: int) -> None:
    task = ToyTask(nan_at=MICRO_BATCHES * step)
    with pytest.raises(UserError, match=f"the loss is nan at step {step};") as caught:
        toy_run(tmp_path, task=task)
    assert "\n" not in str(caught.value)
    last = tmp_path / "toy" / "checkpoints" / "last.pt"
    if step == 3:
        assert "there is no checkpoint" in str(caught.value) and not last.exists()
    else:
        assert str(last) in str(caught.value)
        weights = checkpoint.read(last)["model"].values()
        assert all(tensor.isfinite().all() for tensor in weights)


def test_a_broken_weight_is_not_saved(tmp_path: Path) -> None:
    class Broken(ToyTask):
        def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            loss = super().loss(logits, targets)
            if self.losses == MICRO_BATCHES * 8:  # a finite loss with a gradient that is not
                logits.register_hook(lambda gradient: gradient * torch.inf)
            return loss

    with pytest.raises(UserError, match="a weight is not finite at step 8"):
        toy_run(tmp_path, task=Broken())
    assert checkpoint.read(tmp_path / "toy" / "checkpoints" / "last.pt")["step"] == 4


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        toy_run(tmp_path, task=ToyTask(fail_at=MICRO_BATCHES * 7))
    last = tmp_path / "toy" / "checkpoints" / "last.pt"
    payload = checkpoint.read(last)
    payload["model"]["6.weight"] = torch.zeros(2, 2)
    checkpoint.write(payload, last)
    with pytest.raises(UserError, match=r"last\.pt: does not fit this model: .*6\.weight"):
        toy_run(tmp_path)
    payload["random"] = payload["random"] * 2
    payload["model"]["6.weight"] = torch.zeros(4, 32)
    checkpoint.write(payload, last)
    with pytest.raises(UserError, match="written by 2 processes, resumed by 1"):
        toy_run(tmp_path)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        toy_run(tmp_path)


def test_bfloat16_trains_float32_weights(tmp_path: Path) -> None:
    trainer = toy_trainer(steps=12, precision="bfloat16", micro_batches=1)
    summary, _, model = toy_run(tmp_path, trainer=trainer)
    assert summary["final"]["loss"] < 1.5
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_average_follows_topology_and_permutations(tmp_path: Path) -> None:
    _, directory, model = toy_run(tmp_path, trainer=toy_trainer(ema_decay=0.5))
    averaged = checkpoint.read(directory.checkpoints.last)["average"]
    own = model.state_dict()
    assert all(not permutation.soft for permutation in permutations(model).values())
    for name in own:
        if name.endswith(("active", "index")):
            assert torch.equal(averaged[name], own[name]), name
        elif name.endswith("values"):
            # With this decay the average is near the weights, so rows are where they belong.
            torch.testing.assert_close(averaged[name], own[name], rtol=0, atol=0.02)
            assert not torch.equal(averaged[name], own[name])


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    results = []
    for parts in (1, 4):
        trainer = toy_trainer(micro_batches=parts, precision="float64")
        _, _, model = toy_run(tmp_path, name=str(parts), trainer=trainer, dropout=0.0)
        results.append(model.state_dict())
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-9)


def test_changes_of_topology_do_not_compile_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(24), nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + nn.functional.gelu(self.linear(self.norm(x)))

    counter = torch._dynamo.testing.CompileCounter()
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: compile_module(self, backend=counter, fullgraph=True)
    )
    blocks = nn.Sequential(Block(), Block(), Block())
    model = nn.Sequential(nn.Linear(24, 24), blocks, nn.Linear(24, 4))
    summary, _, _ = toy_run(tmp_path, trainer=toy_trainer(compile=True), model=model)
    assert summary["topology"]["rewires"] == 4 and summary["permutations"]["hardened"] == 4
    # One graph while permutations are soft and one once they are hard, shared by the blocks.
    assert counter.frame_count == 2


def test_blocks_are_found_for_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    from padst_exp.engine.step import compile_blocks

    class Block(nn.Sequential):
        pass

    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    blocks = [Block(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) for _ in range(3)]
    compile_blocks(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"h": nn.ModuleList(blocks)})))
    assert compiled == blocks
