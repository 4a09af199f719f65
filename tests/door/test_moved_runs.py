"""A run whose data, device or links are not what they were: evaluated, exported, trained on."""

import copy
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from omegaconf import OmegaConf

from from_yaml import asked
from hostile import trained_run
from padst_exp import dispatch, identity, stored
from padst_exp import evaluate as entry
from padst_exp.analyze import AnalyzeSchema, analyze
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.engine.lock import Lock
from padst_exp.errors import UserError
from padst_exp.evaluate import EvaluateSchema, evaluate
from padst_exp.export import ExportSchema, export
from padst_exp.restore import open_run

WORDS = "the quick brown fox jumps over a lazy dog and it barks at all of them\n"


def evaluated(path: Path, *changes: str, batch_size: int | None = None) -> dict[str, float]:
    own = {"batch_size": batch_size, "device": "cpu", "changes": changes}
    keys = asked("evaluate", EvaluateSchema, run=str(path), **own)
    return evaluate(keys, World())[1]


def exported(path: Path, *changes: str, out: str | None = None, **keys: Any) -> Path:
    own = {"out": out, "overwrite": True, "batch_size": 3, "device": "cpu", "changes": changes}
    return export(asked("export", ExportSchema, run=str(path), **own | keys), World())[0]


@pytest.fixture(scope="module")
def run_on_text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on a text file, which has moved since; and where the text is now."""
    root = tmp_path_factory.mktemp("text")
    text, moved = root / "old.txt", root / "new place" / "a=[1].txt"
    text.write_text(WORDS * 200)
    data = ["dataset=text_file", f"dataset.path={text}", "dataset.vocab_size=260"]
    run = trained_run(root, "model=gpt2", *data, "dataset.context_length=16", "model.dropout=0.0")
    moved.parent.mkdir()
    text.rename(moved)
    return run, moved


def test_data_may_have_moved(
    run_on_text: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, moved = run_on_text
    expected = json.loads((run / "summary.json").read_text())["final"]
    with pytest.raises(UserError, match=r"^dataset\.path: .*old\.txt"):
        evaluated(run)
    where = f"dataset.path='{moved}'"
    found = evaluated(run, where)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for changes in (("trainer.eval_batch_size=7",), ("trainer.workers=0", "trainer.steps=9")):
        assert evaluated(run, where, *changes) == pytest.approx(found, rel=1e-5)
    assert evaluated(run, where, batch_size=3) == pytest.approx(found, rel=1e-5)
    with pytest.raises(UserError, match=r"^dataset\.path: "):
        exported(run)
    folder = exported(run, where)
    # The export knows where the data are now, and may be told again.
    assert evaluated(folder) == pytest.approx(found, rel=1e-5)
    assert "other data" not in capsys.readouterr().err
    other = moved.with_name("other.txt")
    other.write_text(WORDS * 190)
    evaluated(run, f"dataset.path='{other}'")
    assert "warning: " in (said := capsys.readouterr().err) and "on other data: " in said
    again = moved.rename(moved.with_name("again.txt"))
    assert evaluated(folder, f"dataset.path='{again}'") == pytest.approx(found, rel=1e-5)
    again.rename(moved)


def test_outcomes_add_up_to_the_metric_and_two_models_are_compared(
    run_on_text: tuple[Path, Path], real_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (of_text, moved), figures = run_on_text, {"perplexity": np.exp, "top1": lambda r: 100 * r}
    for run in (of_text, real_run):
        summary = json.loads((run / "summary.json").read_text())
        sums = np.load(run / "outcomes.npy", allow_pickle=False).astype(float).sum(0)
        metric = summary["monitor"]
        expected = summary["final"][metric]
        assert figures[metric](sums[0] / sums[1]) == pytest.approx(expected, rel=1e-6)
    last = str(real_run / "checkpoints" / "last.pt")
    own = {"device": "cpu", "against": last}
    keys = asked("evaluate", EvaluateSchema, run=str(real_run), **own)
    found, lines = entry.compare(keys, last, World())
    assert [path.name for path, _ in found] == ["best.pt", "last.pt"]
    difference = found[0][1]["top1"] - found[1][1]["top1"]
    assert lines[0].startswith(f"top1 of the first less that of the second: {difference:+.4g}, ")
    assert "McNemar" in lines[1]
    place = (f"dataset.path={json.dumps(str(moved))}",)
    with pytest.raises(UserError, match="against: expected a model tested on the same data"):
        entry.compare(
            asked("evaluate", EvaluateSchema, run=str(real_run), device="cpu", changes=()),
            str(exported(of_text, *place, out=str(moved.parent / "export"))), World(),
        )  # fmt: skip
    with pytest.raises(UserError, match="against: expected null beside tasks"):
        asked("evaluate", EvaluateSchema, run=last, tasks=("lambada_openai",), **own)


def test_what_would_change_weights_is_refused(real_run: Path) -> None:
    for change, line in (
        ("sparsity=0.3", "sparsity: expected 0.5, with which the run was trained, got 0.3; what "),
        ("model.depth=2", "model.depth: expected 1, with which the run was trained, got 2"),
        ("seed=1", "seed: expected 0, with which the run was trained, got 1"),
        ("structure=block", "structure: expected nothing, since the run was composed before"),
        ("experiment=structures", "experiment: expected nothing, since the run was composed"),
        ("dst.intervall=1", "dst.intervall: unknown key; did you mean interval?"),
        ("model.depth.of=1", "model.depth.of: unknown key"),
        ("+model.depth=2", "model.depth: expected 1, with which"),
        ("model.checkpoint=x", "model.checkpoint: expected nothing, since the weights of a run "),
        ("init_from=x", "init_from: expected nothing, since the weights of a run lie in its che"),
        ("name=x", "name: expected nothing, since run= names the folder of the run, got x"),
        ("runs=x", "runs: expected nothing, since run= names the folder of the run"),
        ("resume=auto", "resume: expected nothing, since no training goes on"),
        ("device=cuda", "device: expected nothing, since this command has a key of that name"),
        ("backend=magic", "backend: expected auto or native or torch"),
        ("backend=triton", "backend: expected one for this device, a CPU"),
        ("dataset=digits", "dataset: expected one of its keys, as in dataset.key=value, got dig"),
        ("~dataset.root", "~dataset.root: expected dataset.root=value"),
        ("trainer.workers=0,1", "trainer.workers: expected one value"),
        ("trainer.wokers=0", "trainer.wokers: unknown key; did you mean workers?"),
        ("trainer.workers=x", "trainer.workers: expected int, got 'x'"),
        ("trainer.workers.deep=1", "trainer.workers: expected int"),
        ("dataset.root=/x", "dataset.root: unknown key"),
        ("trainer.precision=${oc.env:NOWHERE}", ""),
    ):
        with pytest.raises((UserError, ValueError)) as error:
            evaluated(real_run, change)
        assert str(error.value).startswith(line), change


def test_every_key_of_a_run_is_taken_or_refused_in_a_true_line(real_run: Path) -> None:
    text = (real_run / "config.yaml").read_text()
    trained = stored.parse(text)
    leaves = dict(identity.flat(cast(dict[str, Any], OmegaConf.to_container(trained))))
    assert len(leaves) > 60 and {"seed", "backend", "model.depth"} <= leaves.keys()
    for key, value in leaves.items():
        given = "null" if value is None else str(value)
        if not isinstance(value, list | str):  # as it was, any key may be given
            assert stored.change(trained, [f"{key}={given}"]) in ({key}, set())
        cfg = copy.deepcopy(trained)
        free = key == "backend" or key.partition(".")[0] in ("dataset", "trainer", "logger")
        if free:
            assert stored.change(cfg, [f"{key}=another"]) == {key}
            assert OmegaConf.select(cfg, key) == "another"
            continue
        with pytest.raises(UserError) as error:
            stored.change(cfg, [f"{key}=another"])
        told = str(error.value)
        assert told.startswith(f"{key}: expected ") and ", got another; what may still be" in told
        nothing = told.startswith(f"{key}: expected nothing, since ")
        elsewhere = {"runs", "name", "resume", "device", "model.checkpoint", "model.pretrained"}
        assert nothing == (key in elsewhere or key.startswith("init_")), told
        assert nothing or f"expected {given}, with which the run was trained" in told
        assert cfg == trained


def test_the_products_of_an_evaluation_may_be_others(
    real_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[str] = []
    real = dispatch.forced
    monkeypatch.setattr(dispatch, "forced", lambda *a: (forced.append(a[1]), real(*a))[1])
    expected = evaluated(real_run)
    assert forced == []
    assert evaluated(real_run, "backend=scatter") == pytest.approx(expected, rel=1e-4)
    assert forced == ["scatter"]
    exported(real_run, "backend=scatter", out=str(tmp_path / "packed"))
    assert evaluated(tmp_path / "packed", "backend=torch") == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match=r"^backend: expected one for this device"):
        evaluated(tmp_path / "packed", "backend=triton")


def test_changes_are_typed_as_they_are_in_training(
    run_on_text: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    run, moved = run_on_text
    monkeypatch.setenv("WHERE", str(moved.parent))
    monkeypatch.chdir(tmp_path)

    def typed(*arguments: str) -> tuple[object, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["padst-evaluate", f"run={run}", *arguments])
        code: object = 0
        try:
            entry.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    code, said = typed("dataset.path='${oc.env:WHERE}/a=[1].txt'", "batch_size=4", "device=cpu")
    assert code == 0 and "perplexity" in said
    for argument, line in (
        ("dataset.path=a=[1].txt", "dataset.path=a=[1].txt: cannot be read"),
        ("model.dim=8", "model.dim: expected 16, with which the run was trained, got 8"),
        ("experiment=structures", "experiment: expected nothing, since the run was composed"),
        ("sparse=[]", "sparse: expected "),
        ("bach_size=8", "bach_size: unknown key; did you mean batch_size?"),
    ):
        code, said = typed(argument)
        lines = [one for one in said.splitlines() if one.startswith("padst_exp: error: ")]
        assert code in (1, 2) and len(lines) == 1 and "Traceback" not in said
        assert lines[0].startswith(f"padst_exp: error: {line}"), said


def test_links_that_lie_in_a_run_are_replaced_or_refused(real_run: Path, tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(real_run, run)
    mine.mkdir()
    (mine / "thesis").write_text("all of it")

    def plant(name: str) -> None:
        link = run / name
        link.parent.mkdir(exist_ok=True)
        if link.exists():
            link.unlink()
        link.symlink_to(mine / "thesis")

    names = [path.relative_to(run) for path in run.rglob("*") if path.is_file()]
    for name in (".last.pt.tmp", ".best.pt.link.tmp", "checkpoints/.last.pt.tmp",
                 "checkpoints/.best.pt.link.tmp", "checkpoints/.last.pt.link.tmp",
                 ".metrics.jsonl.tmp", "analysis/cost.png", "analysis/analysis.json"):  # fmt: skip
        plant(name)
    analyze(
        AnalyzeSchema(run=str(run), out=None, parts=("cost",), device="cpu", trust=(), changes=()),
        World(),
    )
    assert (mine / "thesis").read_text() == "all of it"
    assert json.loads((run / "analysis" / "analysis.json").read_text())["cost"]
    assert not (run / "analysis" / "cost.png").is_symlink()
    shutil.rmtree(run / "analysis")

    for name in ("export", "analysis"):
        (run / name).symlink_to(mine)
    with pytest.raises(UserError, match=r"^out: expected a folder, got .*export, a link to "):
        exported(run)
    with pytest.raises(UserError, match=r"^out: expected a folder, got .*analysis, a link to "):
        analyze(
            AnalyzeSchema(
                run=str(run), out=None, parts=("cost",), device="cpu", trust=(), changes=()
            ),
            World(),
        )
    assert os.listdir(mine) == ["thesis"]

    # Training goes on over links to every file that it writes.
    for path in names:
        if path.name not in ("config.yaml", "last.pt"):
            plant(str(path))
    for left in (lambda: plant("lock.json"), lambda: (run / "lock.json").symlink_to("nowhere"),
                 lambda: os.mkfifo(run / "lock.json")):  # fmt: skip
        left()
        lock = Lock(run)
        lock.acquire()
        assert not (run / "lock.json").is_symlink()
        lock.release()
    plant("lock.json")
    resumed(run)
    assert (mine / "thesis").read_text() == "all of it"
    for name in ("metrics.jsonl", "summary.json", "curves.png", "topology.png"):
        assert (run / name).is_file() and not (run / name).is_symlink(), name


def resumed(run: Path) -> None:
    """Let the training of `run` write all its files again."""
    (run / "summary.json").unlink(missing_ok=True)
    trained_run(run.parent, "resume=auto")


def test_a_run_from_before_there_were_scales_is_read(real_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(real_run, run)
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("scale:", "arm:"))]
    assert len(kept) == len(lines) - 2
    (run / "config.yaml").write_text("".join(kept))
    for path in (run / "checkpoints").iterdir():  # which have it as well
        checkpoint.write({**checkpoint.read(path), "config_text": "".join(kept)}, path)
    config = open_run(run).config
    assert config.scale is None and config.arm is None
