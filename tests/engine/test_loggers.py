import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from from_yaml import from_yaml
from padst_exp.engine import progress
from padst_exp.engine.loggers import NoLogger
from padst_exp.engine.progress import Progress


class FailingRun:
    def log(self, values: dict[str, float], step: int) -> None:
        raise ConnectionResetError("the service\nis gone")


def test_a_failing_service_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = from_yaml("logger/wandb")
    monkeypatch.setattr(logger, "_init", lambda *_: FailingRun())
    logger.start(tmp_path, {})
    for step in range(3):
        logger.log(step, {"loss": 1.0})
    logger.finish({})
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ConnectionResetError: the service" in error


def test_a_service_that_does_not_start_is_survived(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = from_yaml("logger/wandb")
    monkeypatch.setattr(logger, "_init", lambda *_: 1 / 0)
    logger.start(tmp_path, {})
    logger.log(1, {"loss": 1.0})
    logger.finish({"a": {"b": 1}})
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.slow
def test_offline_needs_no_account(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from from_yaml import from_yaml
logger = from_yaml("logger/wandb", tags=["t"], group="g")
for step in (1, 2):
    logger.start(Path({str(tmp_path)!r}), {{"seed": 0}})
    assert logger._run is not None
    logger.log(step, {{"loss": 0.5}})
    logger.finish({{"best": {{"loss": 0.5}}, "none": None, "events": [{{"x": 1}}]}})
"""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            "PYTHONPATH": f"{root / 'src'}:{root / 'kernels'}:{root / 'tests'}",
            "HOME": str(tmp_path),
            "PATH": "/usr/bin:/bin",
        },
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and "warning" not in result.stderr
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    name = f"run-{(tmp_path / 'wandb_id.txt').read_text().strip()}.wandb"
    assert files and {file.name for file in files} == {name}


def test_no_logger_does_nothing(tmp_path: Path) -> None:
    logger = NoLogger()
    logger.start(tmp_path, {})
    logger.log(1, {"loss": 1.0})
    logger.finish({})
    assert not list(tmp_path.iterdir())


def test_a_log_file_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = Progress(total=200, step=0, shown=True)
    for step in range(100):
        now[0] += 0.25
        shown.advance()
        shown.show(f"loss {json.dumps(step)}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["step 40/200, loss 39, 00:40 left", "step 80/200, loss 79, 00:30 left"]
    hidden = Progress(total=200, step=0, shown=False)
    now[0] += 60
    hidden.show("loss 1")
    hidden.say("hello")
    assert capsys.readouterr().err == ""


def recorded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, environment: dict[str, str], **changes: Any
) -> list[dict[str, Any]]:
    """What `wandb.init` was called with when a run in `folder` was started."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> None:
        calls.append(arguments)

    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", init)
        patch.delenv("WANDB_MODE", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        from_yaml("logger/wandb", **changes).start(folder, {})
    return calls


def test_a_run_directory_is_one_run_of_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [recorded(monkeypatch, tmp_path, {}, mode="online")[0] for _ in range(2)]
    assert calls[0]["id"] == calls[1]["id"] and calls[1]["resume"] == "allow"
    (tmp_path / "wandb_id.txt").write_text("../../x\n")
    assert recorded(monkeypatch, tmp_path, {})[0]["id"] not in ("../../x", calls[0]["id"])


def test_the_environment_says_where_and_the_config_says_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for switch in ({"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}):
        assert recorded(monkeypatch, tmp_path, switch) == []
        assert f"wandb is disabled, as {next(iter(switch))} in the" in capsys.readouterr().err
    (call,) = recorded(monkeypatch, tmp_path, {"WANDB_MODE": "dryrun", "WANDB_DIR": "/x"})
    assert (call["mode"], call["dir"]) == ("offline", "/x")
    assert capsys.readouterr().err == ""
    for environment, mode in (
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_DISABLED": "false"}, ""),
    ):
        (call,) = recorded(monkeypatch, tmp_path, environment)
        assert (call["mode"], call["dir"]) == (mode or "offline", tmp_path)
        assert (f"wandb is {mode}" in capsys.readouterr().err) == bool(mode)
    (call,) = recorded(monkeypatch, tmp_path, {"WANDB_PROJECT": "other", "WANDB_MODE": "odd"})
    assert (call["mode"], call["project"]) == ("offline", "padst-exp")
    assert capsys.readouterr().err == (
        "WANDB_PROJECT is set, but logger.project of this run is padst-exp\n"
    )
