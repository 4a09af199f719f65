"""Mistakes end in one line on stderr and the right status; bugs keep their traceback."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from padst_exp.cli import command_line
from padst_exp.config import build, run_settings
from padst_exp.errors import UserError

Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Program:
    """Runs a task with arguments in an empty folder; returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(task: Callable[[DictConfig], None], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["padst-train", *arguments])
        status = 0
        try:
            command_line("config")(task)()
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def checked(cfg: DictConfig) -> None:
    run_settings(cfg)
    build(cfg.structure, "structure")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["structure=nn"], 1, "structure=nn: unknown option; choose from block, dense, "),
        (["structre=nm"], 1, "structre: unknown key; did you mean structure?"),
        (["structure.grup=3"], 1, "structure.grup: unknown key; did you mean group?"),
        (["structure.n=abc"], 1, "structure.n: expected int, got 'abc'"),
        (["structure.n=0"], 1, "structure.n: expected an integer of at least 1, got 0"),
        (["+structure.k=3"], 1, "structure.k: unknown key; known: group, m, n"),
        (["sparsity=abc"], 1, "sparsity: Value 'abc' of type 'str' could not be converted"),
        (["sparsity=1.5"], 1, "sparsity: expected a number in [0, 1), got 1.5"),
        (["sparsity=???"], 1, "sparsity: missing, set it on the command line"),
        (["runs=${nowhere}"], 1, "runs: Interpolation key 'nowhere' not found"),
        (["sparsity"], 2, "sparsity: cannot be read, expected key=value"),
        (["--config-name", "nope"], 1, "--config-name: "),
    ],
)
def test_mistakes_are_one_line(
    program: Program, arguments: list[str], status: int, message: str
) -> None:
    code, out, err = program(checked, *arguments)
    assert code == status
    assert out == ""
    assert err.startswith(f"padst_exp: error: {message}")
    assert err.count("\n") == 1
    assert err.endswith("\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("dataset.root: no such\nfolder"), "dataset.root: no such folder"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
            "x: No such file or directory",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    ],
)
def test_errors_of_a_run_are_one_line(program: Program, error: Exception, line: str) -> None:
    def task(cfg: DictConfig) -> None:
        raise error

    assert program(task) == (1, "", f"padst_exp: error: {line}\n")


@pytest.mark.parametrize("error", [RuntimeError("bug"), ValueError("bug"), OSError(5, "bug")])
def test_bugs_keep_their_traceback(program: Program, error: Exception) -> None:
    def task(cfg: DictConfig) -> None:
        raise error

    with pytest.raises(type(error), match="bug"):
        program(task)


def test_full_errors_on_request(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError):
        program(checked, "sparsity=1.5")


def test_interruption(program: Program) -> None:
    def task(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    assert program(task) == (130, "", "padst_exp: interrupted\n")


def test_a_sweep_stops_at_the_first_mistake_and_names_the_job(program: Program) -> None:
    seen = []

    def task(cfg: DictConfig) -> None:
        seen.append(cfg.seed)
        checked(cfg)

    code, _, err = program(task, "--multirun", "seed=0,1", "structure.n=1,0")
    assert code == 1
    assert seen == [0, 0]
    assert err == (
        "padst_exp: error: job 1 (seed=0 structure.n=0): "
        "structure.n: expected an integer of at least 1, got 0\n"
    )


def test_hydra_leaves_nothing_behind(program: Program, tmp_path: Path) -> None:
    folder = []
    code, _, err = program(lambda cfg: folder.append(os.getcwd()))
    assert (code, err) == (0, "")
    assert folder == [str(tmp_path)]
    assert list(tmp_path.iterdir()) == []
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_config_and_help_are_printed(program: Program) -> None:
    status, out, _ = program(checked, "--cfg", "job", "sparsity=0.75")
    assert (status, "sparsity: 0.75" in out) == (0, True)
    status, out, _ = program(checked, "--help")
    assert status == 0
    assert "structure: block, dense, diag, nm, unstructured" in out


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; import padst_exp.train, padst_exp.evaluate; "
        "print({'torch', 'timm', 'transformers', 'scipy'} & set(sys.modules))"
    )
    # pytest's own path is not inherited.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")
