"""Trackers besides W&B, each read back from its local store by its own reader."""

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from engine.toy import ToyTask, toy_run
from from_yaml import from_yaml
from padst_exp.config import config_dir, options
from padst_exp.engine.distributed import World
from padst_exp.engine.loggers import numbers
from padst_exp.engine.records import read_metrics
from padst_exp.errors import UserError
from padst_exp.train import open_directory

LABELS = {"experiment": "vit", "arm": "diag", "scale": "demo"}
CONFIG = {"seed": 0, "model": {"dim": 3}, "distribution": {"blocks.*": 0.5}, "none": None}
SUMMARY = {"steps": 10, "best": {"top1": 3.0}, "final": {"top1": 2.5}, "timing": {"seconds": 9.0}}
Series = dict[str, list[tuple[int, float]]]


def row(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1 / step, "penalty": {"a.b": 2.0 * step}}


def killed_and_resumed(folder: Path, name: str) -> None:
    """Steps 1 to 7, a kill, and a resume from the checkpoint of step 4 up to 10."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    killed = from_yaml(f"logger/{name}")
    killed.start(folder, CONFIG, labels=LABELS)
    assert killed._run is not None
    for step in range(1, 8):
        killed.log(step, numbers(row(step)))
    if name == "trackio":
        killed._run._flush_queues_inline()  # as its thread does twice a second
    resumed = from_yaml(f"logger/{name}")
    resumed.start(folder, CONFIG, rows=map(row, range(1, 5)), labels=LABELS)
    for step in range(5, 11):
        resumed.log(step, numbers(row(step)))
    resumed.finish(SUMMARY)


def require_whole(series: Series) -> None:
    """Every step is there once, with its value."""
    steps = range(1, 11)
    for key in ("train/loss", "train/penalty/a.b"):
        assert sorted(step for step, _ in series[key]) == [*steps]
        assert dict(series[key]) == pytest.approx({s: numbers(row(s))[key] for s in steps})
    assert [value for _, value in series["summary/best/top1"]] == [3.0]
    assert not any("timing" in key for key in series)


def tensorboard_series(folder: Path) -> Series:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    killed_and_resumed(tmp_path / "run", "tensorboard")
    require_whole(tensorboard_series(tmp_path / "run"))


def test_what_tensorboard_has_of_a_resumed_run_is_what_its_metrics_are(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(ConnectionError):
        toy_run(tmp_path, task=ToyTask(fail_at=27), logger=from_yaml("logger/tensorboard"))
    _, directory, _ = toy_run(tmp_path, logger=from_yaml("logger/tensorboard"))
    series = tensorboard_series(directory.path)
    logged: Series = {}
    for one in read_metrics(directory.path / "metrics.jsonl"):
        for key, value in numbers(one).items():
            logged.setdefault(key, []).append((one["step"], value))
    for key, points in logged.items():
        assert [step for step, _ in series[key]] == [step for step, _ in points]
        near = pytest.approx([value for _, value in points], rel=1e-6, nan_ok=True)
        assert [value for _, value in series[key]] == near


@pytest.fixture
def trackio_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of its own; the library reads where it is when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    utils = pytest.importorskip("trackio.utils")
    yield utils.TRACKIO_DIR


def test_trackio_has_each_step_once(
    tmp_path: Path, trackio_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    killed_and_resumed(tmp_path / "run", "trackio")
    assert capfd.readouterr().out == ""
    (known,) = SQLiteStorage.get_run_records("padst-exp")
    assert known["name"].startswith("run-")
    series: Series = {}
    for one in SQLiteStorage.get_logs("padst-exp", run_id=known["id"], run=known["name"]):
        for key, value in one.items():
            if isinstance(value, int | float):
                series.setdefault(key, []).append((one["step"], value))
    require_whole(series)
    config = SQLiteStorage.get_run_config("padst-exp", known["name"], run_id=known["id"])
    assert config["_Group"] == "vit/diag" and config["model"] == {"dim": 3}


@pytest.mark.slow
def test_mlflow_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    killed_and_resumed(tmp_path / "run", "mlflow")
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("vit")
    (run,) = client.search_runs([experiment.experiment_id])
    series = {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    require_whole(series)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["model/dim"] == "3" and run.data.params["none"] == "null"
    assert run.data.tags["arm"] == "diag"
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert files == ["metrics.jsonl"]

    other = tmp_path / "other"
    other.mkdir()
    (other / "mlflow_id.txt").write_text("0" * 32 + "\n")  # of another server
    interrupted = from_yaml("logger/mlflow")
    interrupted.start(other, CONFIG, labels=LABELS)
    interrupted.log(1, {"train/loss": math.inf})
    interrupted.finish({}, exit_code=143)
    runs = client.search_runs([experiment.experiment_id])
    assert {one.info.status for one in runs} == {"FINISHED", "KILLED"}


@pytest.mark.slow
def test_a_server_that_does_not_answer_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    logger = from_yaml("logger/mlflow", uri="http://127.0.0.1:9")
    logger.start(tmp_path, CONFIG)
    logger.log(1, {"loss": 1.0})
    logger.finish(SUMMARY)
    error = capsys.readouterr().err
    assert error.count("warning: mlflow failed and is off now") == 1


def test_a_folder_that_cannot_be_written_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    logger = from_yaml("logger/tensorboard")
    logger.start(tmp_path, CONFIG)
    logger.log(1, {"loss": 1.0})
    logger.finish(SUMMARY)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "tensorboard failed and is off now" in error


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "mlflow"])
def test_a_missing_library_is_told_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    found: Callable[..., object] = importlib.util.find_spec

    def missing(module: str, *rest: Any) -> object:
        return None if module == name else found(module, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    logger = from_yaml(f"logger/{name}")  # evaluating such a run does not need it
    with pytest.raises(UserError, match=rf"pip install 'padst-exp\[{name}\]'"):
        logger.start(tmp_path, {})


def test_a_password_never_gets_into_a_config() -> None:
    for uri in ("https://me:hunter2@host/path", "postgresql://me:hunter2@host/database"):
        with pytest.raises(UserError, match=r"logger\.uri: expected an address without") as caught:
            from_yaml("logger/mlflow", uri=uri)
        assert "hunter2" not in str(caught.value)
    for uri in ("https://host/path", "sqlite:////folder/mlflow.db", "databricks"):
        assert from_yaml("logger/mlflow", uri=uri).uri == uri


def test_wandb_groups_runs_by_experiment_and_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("wandb.init", lambda **given: calls.append(given))
    from_yaml("logger/wandb", tags=["mine"]).start(tmp_path, CONFIG, labels=LABELS)
    from_yaml("logger/wandb", group="own").start(tmp_path, CONFIG, labels=LABELS)
    from_yaml("logger/wandb").start(tmp_path, CONFIG)
    seen = [(call["group"], call["job_type"], call["tags"]) for call in calls]
    plain = (None, None, ())
    assert seen == [("vit", "diag", ("mine", "demo")), ("own", "diag", ("demo",)), plain]
    assert calls[0]["config"]["arm"] == "diag"


def test_a_run_is_labelled_with_what_it_is_trained_for(tmp_path: Path) -> None:
    experiment = options("experiment")[0]
    labels: list[Mapping[str, str]] = []
    for overrides in ([f"experiment={experiment}", "+arm=mine"], []):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            asked = ["name=x", f"runs={tmp_path}", "hydra.job.num=0", *overrides]
            cfg = compose("config", asked, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        directory = open_directory(cfg, World())
        labels.append(directory.labels)
        directory.close()
    assert labels[0]["experiment"] == experiment and labels[0]["arm"] == "mine"
    assert not {"experiment", "arm"} & labels[1].keys()
