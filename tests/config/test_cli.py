"""Mistakes end in one line on stderr and the right status; bugs keep their traceback."""

import argparse
import errno
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from from_yaml import leaf
from padst_exp import cli, config
from padst_exp.cli import command_line
from padst_exp.config import build, config_dir
from padst_exp.errors import UserError
from padst_exp.messages import say
from padst_exp.timm_options import OPTIONS
from padst_exp.train import run_settings
from programs import exit_status

Program = Callable[..., tuple[int, str, str]]

# A config that is read at once, where it does not matter which.
SMALL = {"config": "evaluate"}
# A sweep whose jobs are calls in this process.
IN_HERE = ("--multirun", "hydra/launcher=basic")


@pytest.fixture
def program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Program:
    """Runs a task with arguments in an empty folder; returns status, stdout and stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(
        task: Callable[[DictConfig], None], *arguments: str, config: str = "config"
    ) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["padst-train", *arguments])
        status = exit_status(command_line(config)(task))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def checked(cfg: DictConfig) -> None:
    run_settings(cfg)
    build(cfg.structure, "structure")


def test_argparse_may_look_at_all_help_at_once_as_that_of_python_3_14(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = argparse.ArgumentParser.add_argument

    def check(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
        assert action.help is None or "%" not in action.help

    def add_checked(parser: argparse.ArgumentParser, *names: str, **keys: object) -> object:
        action = add(parser, *names, **keys)
        parser._check_help(action)  # type: ignore[attr-defined]
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check, raising=False)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", add_checked)
    assert program(lambda cfg: None, **SMALL) == (0, "", "")
    assert argparse.ArgumentParser._check_help is check


def test_of_other_packages_only_warnings_are_passed_on(program: Program) -> None:
    def task(cfg: DictConfig) -> None:
        for name in ("", "httpx", "timm.models", "torch.distributed", "hydra.none.of.ours"):
            logging.getLogger(name).debug("detail")
            if not name.startswith("hydra"):
                logging.getLogger(name).info("told")
        logging.getLogger("httpx").warning("slow")
        say("a line of ours")

    root = logging.getLogger()
    before = root.level, root.handlers[:]
    try:
        for name in ("config", "evaluate", "export", "analyze", "bench"):
            run = [] if name in ("config", "bench") else ["run=x"]
            said = program(task, *run, config=name)
            assert said == (0, "", "warning: slow\na line of ours\n"), name
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]


def test_options_of_a_folder_of_ones_own_are_among_those_to_choose_from(program: Program) -> None:
    Path("own/structure").mkdir(parents=True)
    Path("own/structure/runs.yaml").write_text("_target_: mine.Runs\n")
    code, _, err = program(checked, "--config-dir", "own", "structure=run")
    assert code == 1 and "unknown option; choose from block, " in err and ", runs, " in err


def test_mistakes_are_one_line(program: Program) -> None:
    cases = {
        "structure=nn": "structure=nn: unknown option; choose from block, ",
        "dst=nn": "dst=nn: unknown option; choose from cht, chts, ",  # and no _base
        "recipe=nn": "recipe=nn: unknown option; choose from demo, paper/c4, ",
        "structre=nm": "structre: unknown key; did you mean structure?",
        "structure.grup=3": "structure.grup: unknown key; did you mean group?",
        "trainer.device=cpu": "trainer.device: unknown key; did you mean just device?",
        "structure.n=0": "structure.n: expected an integer of at least 1, got 0",
        "structure=null": "structure: expected one of block, ",
        "structure=5": "structure: expected one of block, ",
        "structure=[nm]": "structure: expected one of block, ",
        "+trainer={}": "trainer: expected one of default, longer, got {}",
        "model=vit.yaml": "model=vit.yaml: unknown option; choose from ",
        "model=../model/vit": "model=../model/vit: unknown option; choose from ",
        "dst=_base": "dst=_base: unknown option; choose from ",
        "=1": "=1: cannot be read",
        "+=1": "+=1: cannot be read",
        "~": "~: cannot be read",
        "+anything=1": "anything: unknown key; known: ",
        "++zz={}": "zz: unknown key; known: ",
        "+_target_=x": "_target_: unknown key; known: ",
        "+hydra.x=1": "hydra.x: unknown key; known: ",
        "+hydra.jobs.x=1": "hydra.jobs: unknown key; did you mean job?",
        "++hydra.job.nam=1": "hydra.job.nam: unknown key; did you mean name?",
        "sparsity=abc": "sparsity: expected float, got 'abc'",
        "+sparsty=0.5": "sparsty: unknown key; did you mean sparsity?",
        "runs=${nowhere}": "runs: Interpolation key 'nowhere' not found",
        "--config-name=nope": "--config-name: ",
        "sparsity": "sparsity: cannot be read, expected key=value",
    }
    for argument, message in cases.items():
        code, out, err = program(checked, argument)
        assert (code, out) == (2 if "cannot be read" in message else 1, "")
        assert err.startswith(f"padst_exp: error: {message}"), err
        assert err.count("\n") == 1 and err.endswith("\n")


def test_options_of_timm_name_ours(program: Program) -> None:
    cases = {
        "lr=0.1": "lr: unknown key; did you mean optimizer.lr?",
        "--batch-size=8": "--batch-size: unknown option, expected key=value; did you mean trainer.",
        "--seed": "--seed: unknown option, expected key=value; did you mean seed?",
        "--experiment": "--experiment: unknown option, expected key=value; did you mean name?",
        "--sync-bn": "--sync-bn: unknown option, expected key=value; nothing here does that",
    }
    for argument, message in cases.items():
        code, out, err = program(checked, argument, "1")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"padst_exp: error: {message}"), err
    # Those of a group of the user's own are left alone.
    assert "did you mean" not in program(checked, "+mixup=1")[2]


def test_every_option_of_timm_leads_to_a_key() -> None:
    own = OmegaConf.load(config_dir() / "config.yaml")
    for option, ours in OPTIONS.items():
        assert option == option.lower() and "-" not in option
        if ours is None:
            continue
        group, _, key = ours.partition(" ")[0].partition("=")[0].partition(".")
        assert group in own or (config_dir() / group).is_dir(), ours
        calls = [leaf(f"{group}/{name}") for name in config.options(group)]
        assert key in ("", "<key>") or any(key in call for call in calls), ours


def test_values_that_hydra_cannot_read_are_shown_as_it_can(program: Program) -> None:
    signs = ["=b", "[1]", "(1)", "#1", "~", "ä", "日本", "{b", '"b', ",b", ";b&c!", "=\\"]
    for value in (f"/a{sign}" for sign in signs):
        code, out, err = program(checked, f"run={value}", **SMALL)
        assert (out, err.count("\n")) == ("", 1) and code
        (argument,) = shlex.split(err.rpartition(": ")[2])
        seen: list[str] = []
        assert program(lambda cfg, seen=seen: seen.append(cfg.run), argument, **SMALL)[0] == 0
        assert seen == [value]


def test_nothing_is_given_a_value_without_a_meaning(program: Program) -> None:
    cases = {
        "sparsity=nan": "sparsity: expected a finite number of at most 1e30, got nan",
        "distribution={a: inf}": "distribution.a: expected a finite number of at most 1e30",
        "distribution={a: 1e308}": "distribution.a: expected a finite number of at most 1e30",
        "structure.group=99999999999999999999": "structure.group: expected an integer of at most ",
        "runs='a\tb'": "runs: expected text without control characters, got 'a\\tb'",
        "name='\udcff'": r"name='\xff': expected letters in utf-8",
        "name='\t'": "name: expected text without control characters, got '\\t'",
        "name=-": "name: expected the name of one folder",
        "name=' a'": "name: expected the name of one folder",
        f"name={'a' * 300}": "name: expected the name of one folder",
        "runs=": "runs: expected a folder",
        f"transform={'y' * 5000}": "transform=yyy",
        f"sparsity={'y' * 5000}": "sparsity: expected float, got 'yyy",
    }
    for argument, message in cases.items():
        code, out, err = program(checked, argument)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert len(err) < 2100
        assert err.startswith(f"padst_exp: error: {message}"), err


def test_broken_yaml_is_one_line_that_names_file_and_line(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(config_dir(), conf)
    for module in (cli, config):
        monkeypatch.setattr(module, "config_dir", lambda: conf)
    broken = conf / "structure" / "broken.yaml"
    cases = {
        b"n: [1\nm: 2\n": ", line 2: expected ',' or ']'",
        b"n: 1\n  m: 2\n": ", line 2: mapping values are not allowed here",
        b"pattern: *.fc\n": ", line 1: ",
        b"n: 1\nn: 2\n": ", line 2: found duplicate key n",
        b"n: 1\n\xff\xfe\n": ", line 2: not UTF-8 (invalid start byte)",
        b"n: \x01\n": ": special characters are not allowed",
        b"": ": expected a mapping of keys",
        b"# nothing\n": ": expected a mapping of keys",
        b"- n\n- m\n": ": expected a mapping of keys",
        b"nm\n": ": expected a mapping of keys",
    }
    for content, message in cases.items():
        broken.write_bytes(content)
        code, out, err = program(checked, "structure=broken")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"padst_exp: error: {broken}{message}"), err
    # Nobody else is bothered.
    assert program(checked, "structure=nm") == (0, "", "")


def test_errors_of_a_run_are_one_line(program: Program) -> None:
    errors = {
        "dataset.root: no such folder": UserError("dataset.root: no such\nfolder"),
        "x: No such file or directory": FileNotFoundError(
            errno.ENOENT, "No such file or directory", "x"
        ),
        "x: Permission denied": PermissionError(errno.EACCES, "Permission denied", "x"),
        "No space left on device": OSError(errno.ENOSPC, "No space left on device"),
        "x: Read-only file system": OSError(errno.EROFS, "Read-only file system", "x"),
        "x: File name too long": OSError(errno.ENAMETOOLONG, "File name too long", "x"),
    }
    for line, error in errors.items():

        def task(cfg: DictConfig, error: Exception = error) -> None:
            raise error

        assert program(task, **SMALL) == (1, "", f"padst_exp: error: {line}\n")


def test_bugs_keep_their_traceback(program: Program) -> None:
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bug")
    for error in (RuntimeError("bug"), ValueError("bug"), OSError(5, "bug"), undecodable):

        def task(cfg: DictConfig, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match="bug"):
            program(task, **SMALL)


def test_full_errors_on_request(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError):
        program(checked, "sparsity=1.5")


def test_ctrl_c_before_anything_began_shows_no_traceback() -> None:
    code = (
        "import sys, signal; sys.argv = ['-m']; import padst_exp; "
        "signal.raise_signal(signal.SIGINT)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (130, "padst_exp: interrupted\n")


def test_what_all_processes_meet_process_0_says(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    lost = RuntimeError("[../gloo/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    for rank, error, line in (
        ("0", UserError("a: b"), "a: b"),
        ("1", UserError("a: b"), "process 1: a: b"),
        ("1", lost, "process 1: another process of this run has ended"),
    ):
        monkeypatch.setenv("RANK", rank)

        def task(cfg: DictConfig, error: Exception = error) -> None:
            raise error

        assert program(task, **SMALL) == (1, "", f"padst_exp: error: {line}\n")
        assert len(waited) == (rank != "0")
        waited.clear()


def test_lack_of_memory_is_one_line(program: Program) -> None:
    for error in (
        MemoryError("no more"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ):

        def task(cfg: DictConfig, error: Exception = error) -> None:
            raise error

        code, _, err = program(task, **SMALL)
        assert (code, err.count("\n")) == (1, 1) and "out of memory (" in err


def test_what_a_terminal_would_act_on_is_shown_as_an_escape(program: Program) -> None:
    code, _, err = program(checked, "a\x1b[2J\nb\u202ec", **SMALL)
    assert (code, err.count("\n")) == (2, 1) and err[:-1].isprintable()


def test_interruption(program: Program) -> None:
    def task(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    assert program(task, **SMALL) == (130, "", "padst_exp: interrupted\n")


def test_a_sweep_goes_on_after_a_failed_job_and_fails_at_its_end(program: Program) -> None:
    seen = []

    def task(cfg: DictConfig) -> None:
        seen.append(cfg.seed)
        checked(cfg)

    code, _, err = program(task, *IN_HERE, "seed=0,1", "structure.n=1,0")
    assert code == 1
    assert seen == [0, 0, 1, 1]
    line = "structure.n: expected an integer of at least 1, got 0\n"
    assert err == (
        f"padst_exp: error: job 1 (seed=0 structure.n=0 resume=auto): {line}"
        f"padst_exp: error: job 3 (seed=1 structure.n=0 resume=auto): {line}"
        "padst_exp: error: 2 jobs of this sweep failed: 1, 3\n"
    )

    def bug(cfg: DictConfig) -> None:
        seen.append(cfg.seed)
        if cfg.seed == 2:
            raise ZeroDivisionError("of ours")

    code, _, err = program(bug, *IN_HERE, "seed=2,3")
    assert code == 1 and seen[-1] == 3
    assert "Traceback" in err and err.endswith("1 jobs of this sweep failed: 0\n")


def test_an_experiment_is_a_sweep(program: Program) -> None:
    seen = []
    code, _, err = program(
        lambda cfg: seen.append((cfg.structure._target_, cfg.permutation._target_, cfg.model.dim)),
        "experiment=structures",
        "structure=block",
        "hydra/launcher=basic",
    )
    assert (code, err) == (0, "")
    assert len(set(seen)) == len(seen) == 3
    assert {(structure, dim) for structure, _, dim in seen} == {("padst_exp.structures.Block", 128)}


def test_hydra_leaves_nothing_behind(program: Program) -> None:
    folder = []
    code, _, err = program(lambda cfg: folder.append(Path.cwd()))
    assert (code, err) == (0, "")
    assert folder == [Path.cwd()]
    assert list(Path.cwd().iterdir()) == []
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_config_and_help_are_printed(program: Program) -> None:
    status, out, _ = program(checked, "--cfg", "job", "sparsity=0.75")
    assert (status, "sparsity: 0.75" in out) == (0, True)
    status, out, _ = program(checked, "--help")
    assert status == 0
    lines = out.splitlines()
    models = sorted(path.stem for path in (config_dir() / "model").glob("[!_]*.yaml"))
    assert f"model: {', '.join(models)}" in " ".join(out.split())
    assert any(line.startswith("recipe: demo, paper/c4, ") for line in lines)
    assert "_" not in {word[0] for line in lines for word in line.split()}


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
