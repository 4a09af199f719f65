import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dst_cases import rigl, set_algorithm
from engine.moving import Moving
from engine.toy import (
    MICRO_BATCHES,
    STEPS,
    ToyTask,
    assert_same_run,
    start_ranks,
    timeless,
    toy_experiment,
    toy_run,
    toy_trainer,
)
from from_yaml import from_yaml
from padst_exp import dispatch
from padst_exp.dispatch import Pick
from padst_exp.dst import Cubic
from padst_exp.engine import checkpoint
from padst_exp.engine.backends import choose_backends, describe, octaves
from padst_exp.engine.distributed import World
from padst_exp.engine.interruption import Interrupted
from padst_exp.engine.loop import announce
from padst_exp.engine.records import read_metrics
from padst_exp.engine.run_directory import RunDirectory
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear, permutations, sparse_layers
from padst_exp.structures import Block

Straight = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    summary, directory, _ = toy_run(tmp_path_factory.mktemp("straight"), pictures=True)
    return summary, directory.path


def cut(root: Path, step: int, *, start: int = 0, **settings: Any) -> Path:
    """A run that starts (or goes on) after step `start` and fails in the middle of `step`."""
    task = ToyTask(fail_at=MICRO_BATCHES * (step - start))
    with pytest.raises(ConnectionError):
        toy_run(root, task=task, **settings)
    torch.manual_seed(12345)
    return root / "toy" / "checkpoints" / "last.pt"


def test_a_run_learns_and_leaves_its_files(straight: Straight) -> None:
    summary, path = straight
    kinds = [row["kind"] for row in read_metrics(path / "metrics.jsonl")]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "train": STEPS / 3,
        "eval": 3,
        "rewire": 4,
        "soft": 4,  # beside every row of training until the choices harden at step 15
        "harden": 2,
    }
    for name in ("summary.json", "curves.png", "topology.png"):
        assert (path / name).stat().st_size > 100
    assert summary["steps"] == STEPS and summary["final"]["accuracy"] > 0.4
    assert summary["topology"]["updates"] == 4
    assert summary["topology"]["explored"] > summary["density_of_layers"]
    assert summary["permutations"]["hardened"] == 2 and not summary["permutations"]["still_soft"]
    assert summary["baselines"] == {"chance accuracy": 0.25}


def test_a_finished_run_is_not_repeated(straight: Straight) -> None:
    summary, path = straight
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    again, directory, _ = toy_run(path.parent)
    assert again == json.loads(json.dumps(summary)) and directory.path == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_a_resumed_run_equals_a_straight_one(tmp_path: Path, straight: Straight) -> None:
    # Before the first checkpoint, at an evaluation, around the hardenings, after the last update.
    for cuts in ([2], [11, 12], [15, 16, 17], [30]):
        root, start = tmp_path / str(cuts), 0
        for step in cuts:
            last = cut(root, step, start=start)
            start = checkpoint.read(last)["step"] if last.exists() else 0
        toy_run(root)
        assert_same_run(straight[1], root / "toy")


def test_a_run_whose_entries_shrink_resumes_equal(tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        trainer = toy_trainer(checkpoint_interval=1, keep_last=STEPS)
        return {"algorithm": Moving(), "trainer": trainer}

    summary, directory, _ = toy_run(tmp_path, **settings())
    events = [
        (event["of"], event["step"])
        for kind in ("selections", "permutations")
        for event in summary[kind]["events"]
    ]
    assert events == [("selection", 12), ("permutation", 15), ("permutation", 15)]
    paths = sorted(directory.checkpoints.folder.glob("step-*.pt"))
    sizes = [
        [len(checkpoint.read(path)["model"][f"{layer}.weights.0.values"]) for path in paths]
        for layer in (0, 4)
    ]
    # One loses its units when the selection settles, the other some at every update.
    assert len(set(sizes[0])) == 2 and sizes[0][10] > sizes[0][11]
    assert len(set(sizes[1])) == 5 and sizes[1] == sorted(sizes[1], reverse=True)
    for step in (3, 13, 16):
        root = tmp_path / str(step)
        cut(root, step, **settings())
        toy_run(root, **settings())
        assert_same_run(directory.path, root / "toy")


def test_a_run_killed_at_any_moment_equals_a_straight_one(
    tmp_path: Path, straight: Straight
) -> None:
    metrics = tmp_path / "toy" / "metrics.jsonl"
    draw = random.Random(0)
    for row in (2, 7, 12):
        (process,) = start_ranks(plain_run, tmp_path)
        deadline = time.monotonic() + 120
        while len(read_metrics(metrics)) < row and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.02 * draw.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    plain_run(World(), tmp_path)
    path = tmp_path / "toy"
    assert_same_run(straight[1], path)
    assert not list((path / "checkpoints").glob(".*"))


def plain_run(world: World, root: Path) -> None:
    toy_run(root, world=world)


def test_a_kill_before_the_summary(
    tmp_path: Path, straight: Straight, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toy_run(tmp_path)
    _, directory, _ = toy_run(tmp_path)
    assert_same_run(straight[1], directory.path)


def test_a_resumed_run_computes_with_the_backends_it_began_with(tmp_path: Path) -> None:
    last = cut(tmp_path, 7, backend="auto")
    payload = checkpoint.read(last)
    assert len(payload["backends"]["picks"]) == 2
    for choice in payload["backends"]["picks"].values():
        choice["backend"] = "scatter"
    checkpoint.write(payload, last)
    summary, _, model = toy_run(tmp_path, backend="auto")
    assert {row["backend"] for row in summary["backends"].values()} == {"scatter"}
    assert {layer.backend for layer in sparse_layers(model).values()} == {"scatter"}


def test_a_layer_is_measured_again_when_its_density_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[set[str]] = []

    def choose(model: nn.Module, example: Any, *, kept: Any, **_: Any) -> dict[str, Pick]:
        with torch.no_grad():
            example()
        torch.rand(3)  # whatever measuring draws
        layers = sparse_layers(model)
        found = {name: Pick("torch" if octaves(model)[name] == 0 else "scatter") for name in layers}
        measured.append(layers.keys() - (kept or {}).keys())
        dispatch.reuse(model, {**found, **(kept or {})})
        return {**found, **(kept or {})}

    monkeypatch.setattr(dispatch, "choose", choose)
    settings: dict[str, Any] = {"backend": "auto", "algorithm": Moving()}
    summary, directory, model = toy_run(tmp_path, **settings)
    # Both start at twice their density; one falls at once, the other at every update.
    assert measured == [{"0", "4"}, {"4"}, {"0"}]
    assert {row["backend"] for row in summary["backends"].values()} == {"scatter"}
    assert {layer.backend for layer in sparse_layers(model).values()} == {"scatter"}
    # A resumed run takes the picks over, and measures what changes from there on.
    for step, again in ((4, [{"4"}, {"0"}]), (8, [{"0"}]), (14, [])):
        root = tmp_path / str(step)
        cut(root, step, backend="auto", algorithm=Moving())
        measured.clear()
        toy_run(root, backend="auto", algorithm=Moving())
        assert measured == again, step
        assert_same_run(directory.path, root / "toy")


def test_a_backend_asked_for_wins_over_the_checkpoint(tmp_path: Path) -> None:
    payload = checkpoint.read(cut(tmp_path, 7, backend="scatter"))
    picks = payload["backends"]["picks"].values()
    assert {choice["backend"] for choice in picks} == {"scatter"}
    summary, _, _ = toy_run(tmp_path, backend="torch")
    assert {row["backend"] for row in summary["backends"].values()} == {"torch"}


def test_rank_0_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = choose_backends(toy_experiment(), world=World(), saved=None)
    scatter = {name: replace(choice, backend="scatter") for name, choice in decided.items()}
    saved = dispatch.save(decided, torch.device("cpu"))
    # What another rank receives counts, whatever its own device would have chosen.
    monkeypatch.setattr(World, "from_main", lambda self, value: scatter if value is None else value)
    experiment = toy_experiment(backend="auto")
    assert choose_backends(experiment, world=World(1, 2), saved=saved) == scatter
    assert {layer.backend for layer in sparse_layers(experiment.model).values()} == {"scatter"}


def test_a_run_too_short_for_any_update_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for interval, stop, said in ((5, 0.75, False), (STEPS, 0.75, True), (5, 0.0, True)):
        algorithm = rigl(interval=interval, stop=stop)
        announce(toy_experiment(algorithm=algorithm), mock.Mock(path=tmp_path), World())
        assert ("no topology ever changes" in capsys.readouterr().err) == said


def test_layers_slower_than_dense_are_not_hidden_behind_fast_ones() -> None:
    fast = Pick("torch", 8, "float32", {"torch": 1.0, "dense": 4.0})
    slow = Pick("torch", 8, "float32", {"torch": 2.0, "dense": 1.0})
    unknown = Pick("scatter")
    line = describe({"a": fast, "b": fast, "c": slow, "d": unknown})
    assert "3 by torch (4.00x dense), 1 of them slower" in line and "0.50x" in line
    assert line.endswith("1 not called (as in attention, which reads weights)")
    assert describe({"a": unknown, "b": unknown}).endswith(": 2 by scatter")


def test_a_signal_saves_and_exits(
    tmp_path: Path, straight: Straight, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = toy_trainer(checkpoint_interval=None)

    class Signalled(ToyTask):
        signum = signal.SIGTERM

        def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
            if self.losses == MICRO_BATCHES * 13:
                os.kill(os.getpid(), self.signum)
            return super().loss(logits, targets)

    for signum, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        task = Signalled()
        task.signum = signum
        root, before = tmp_path / str(status), signal.getsignal(signum)
        with pytest.raises(Interrupted) as caught:
            toy_run(root, task=task, trainer=trainer)
        assert caught.value.code == status
        assert signal.getsignal(signum) == before
        assert "interrupted at step 14" in capsys.readouterr().err
        assert checkpoint.read(root / "toy" / "checkpoints" / "last.pt")["step"] == 14
    _, directory, _ = toy_run(root, trainer=trainer)
    assert timeless(read_metrics(straight[1] / "metrics.jsonl")) == timeless(
        read_metrics(directory.path / "metrics.jsonl")
    )


def test_a_nan_stops_the_run(tmp_path: Path) -> None:
    # 15 is the deadline of the permutations: they must not harden to what a NaN made of them.
    for step in (3, 11, 15):
        root = tmp_path / str(step)
        with pytest.raises(UserError, match=f"the loss is nan at step {step};") as caught:
            toy_run(root, task=ToyTask(nan_at=MICRO_BATCHES * step))
        assert "\n" not in str(caught.value)
        last = root / "toy" / "checkpoints" / "last.pt"
        if step == 3:
            assert "there is no checkpoint" in str(caught.value) and not last.exists()
        else:
            assert str(last) in str(caught.value)
            weights = checkpoint.read(last)["model"].values()
            assert all(tensor.isfinite().all() for tensor in weights)


def test_a_broken_weight_is_not_saved(tmp_path: Path) -> None:
    class Broken(ToyTask):
        def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
            loss = super().loss(logits, targets)
            if self.losses == MICRO_BATCHES * 8:  # a finite loss with a gradient that is not
                logits.register_hook(lambda gradient: gradient * torch.inf)
            return loss

    with pytest.raises(UserError, match="a weight is not finite at step 8"):
        toy_run(tmp_path, task=Broken())
    assert checkpoint.read(tmp_path / "toy" / "checkpoints" / "last.pt")["step"] == 4


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    last = cut(tmp_path, 7)
    payload = checkpoint.read(last)
    payload["model"]["6.weight"] = torch.zeros(2, 2)
    checkpoint.write(payload, last)
    with pytest.raises(UserError, match=r"last\.pt: does not fit this model: .*6\.weight"):
        toy_run(tmp_path)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"one that training wrote, got \S*last\.pt"):
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
        _, _, model = toy_run(
            tmp_path, name=str(parts), trainer=trainer, dropout=0.0, algorithm=Moving()
        )
        results.append(model.state_dict())
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-9)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.gelu(self.linear(self.norm(x)))


def blocks(number: int) -> nn.Module:
    torch.manual_seed(0)
    alike = nn.Sequential(*(Residual() for _ in range(number)))
    return nn.Sequential(nn.Linear(24, 24), alike, nn.Linear(24, 4))


@pytest.fixture
def compiled_frames(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts how often torch compiles anything; what it compiles runs as it would eagerly."""
    counter = CompileCounter()
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: compile_module(self, backend=counter, fullgraph=True)
    )
    with torch._dynamo.config.patch(recompile_limit=8):
        yield counter


def test_changes_of_topology_do_not_compile_anew(
    tmp_path: Path, compiled_frames: CompileCounter
) -> None:
    trainer = toy_trainer(compile=True)
    summary, _, _ = toy_run(tmp_path, trainer=trainer, model=blocks(3))
    assert summary["topology"]["updates"] == 4 and summary["permutations"]["hardened"] == 4
    # One graph while permutations are soft and one once they are hard, shared by the blocks.
    assert compiled_frames.frame_count == 2


def test_a_change_of_the_number_of_entries_compiles_once_more(
    tmp_path: Path, compiled_frames: CompileCounter
) -> None:
    results = []
    for compiling in (False, True):
        _, directory, model = toy_run(
            tmp_path,
            name=str(compiling),
            trainer=toy_trainer(steps=16, compile=compiling),
            algorithm=set_algorithm(counts=Cubic(start=0.8, begin=0, end=0.7), stop=0.75),
            learner=from_yaml("permutation/none"),
            structure=Block(size=2, balanced=False),
            model=blocks(2),
        )
        results.append(model.state_dict())
    rows = read_metrics(directory.path / "metrics.jsonl")
    densities = {row["density"] for row in rows if row["kind"] == "rewire"}
    # More often than torch compiles one code anew before it gives up.
    assert len(densities) > torch._dynamo.config.recompile_limit
    assert compiled_frames.frame_count == 1 + len(densities)
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_topology_is_chosen_by_what_is_not_finite(tmp_path: Path, value: float) -> None:
    forward = SparseLinear.forward

    def poisoned(self: SparseLinear, x: Tensor) -> Tensor:
        y = forward(self, x)
        if any(weight.collect_dense_gradient for weight in self.parts()):  # an update is due
            y.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), value))
        return y

    trainer = toy_trainer(checkpoint_interval=1)
    wanted = (
        r"^training diverged: a gradient or a weight is not finite at step (\d+); the last good"
    )
    for algorithm in (rigl(interval=4), Moving()):
        root = tmp_path / type(algorithm).__name__
        with (
            mock.patch.object(SparseLinear, "forward", poisoned),
            pytest.raises(UserError, match=wanted) as caught,
        ):
            toy_run(root, algorithm=algorithm, trainer=trainer)
        step = int(re.findall(r"at step (\d+)", str(caught.value))[0])
        saved = checkpoint.read(root / "toy" / "checkpoints" / "last.pt")
        assert saved["step"] == step - 1
        assert all(t.isfinite().all() for t in saved["model"].values() if t.is_floating_point())


def test_the_summary_counts_permutations_and_selections_apart(tmp_path: Path) -> None:
    summary, _, model = toy_run(tmp_path, algorithm=Moving())
    both = summary["permutations"], summary["selections"]
    assert [kind["hardened"] for kind in both] == [2, 1]
    assert not set(names(both[0])) & set(names(both[1]))
    assert all(kind["penalty_curve"] and not kind["still_soft"] for kind in both)
    assert both[0]["distance_to_identity"].keys() == permutations(model).keys()


def names(kind: dict[str, Any]) -> list[str]:
    return [event["choice"] for event in kind["events"]]
