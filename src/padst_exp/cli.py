"""What every entry point shares: Hydra underneath, and one line for each mistake."""

import argparse
import contextlib
import errno
import functools
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, cast

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from padst_exp import end_quietly
from padst_exp.config import closest, config_dir, options
from padst_exp.engine.interruption import Interrupted
from padst_exp.errors import UserError, is_lack_of_memory
from padst_exp.files import reading
from padst_exp.messages import printable, say
from padst_exp.overrides import (
    ambiguous,
    check_hydra,
    check_options,
    check_overrides,
    not_letters,
    unreadable,
)
from padst_exp.signals import WARNINGS
from padst_exp.timm_options import OPTIONS

FAILURE, USAGE, INTERRUPTED = 1, 2, 130
LONGEST_LINE = 2000

# A launcher looks several times a second whether a process has ended, and then ends the others.
SECONDS_TO_BE_ENDED = 3


def command_line(
    config_name: str, *, of_run: bool = False
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorate a function of a config into a program with Hydra's command line.

    A sweep goes on after a job that fails, says at its end which did, and fails.

    A mistake of the user ends in one line on stderr and status 1 (2 when an argument cannot be
    read, 130 on Ctrl-C); anything else is a bug and keeps its traceback, as does everything under
    HYDRA_FULL_ERROR=1.

    Args:
        config_name: file of conf/, without the suffix.
        of_run: whether the program is about a finished run. Overrides of keys that only a training
            has are then meant for the config of that run: they become its key `changes`.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> None:
            full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
            launcher = os.getpid()
            composed = False
            failed: list[int] = []
            changes = _changes(config_name) if of_run else []

            @functools.wraps(task)
            def job(cfg: DictConfig) -> str | None:
                nonlocal composed
                composed = True
                _hear("padst_kernels")
                if changes:
                    cfg.changes = [*cfg.changes, *changes]
                try:
                    _require_keys()
                    check_hydra(cast(DictConfig, HydraConfig.get()))
                    _meet_peers()
                    task(cfg)
                except Interrupted as stop:
                    _ask_for_requeue(stop.signum)
                    raise
                except Exception as error:
                    if full_error:
                        raise
                    elsewhere = os.getpid() != launcher  # on a cluster
                    sweeping = elsewhere or HydraConfig.get().mode is RunMode.MULTIRUN
                    if sweeping and not elsewhere:
                        failed.append(HydraConfig.get().job.num)
                    if not _is_expected(error):
                        if not sweeping:
                            raise
                        traceback.print_exc()
                    _say(f"error: {_process()}{_job_name()}{explain(error)}")
                    if not sweeping:
                        sys.exit(FAILURE)
                    return explain(error) if elsewhere else None
                return None

            if {"--help", "-h"} & set(sys.argv[1:]):
                sys.stdout.write(_help(config_name))
                return
            program = hydra.main(
                config_path=str(config_dir()), config_name=config_name, version_base="1.3"
            )(job)
            try:
                if signal.getsignal(signal.SIGINT) is end_quietly:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                if config_name == "config":
                    check_options(sys.argv[1:], _training_keys(), OPTIONS)
                check_overrides(sys.argv[1:])
                with _raising_hydra(), _lazy_help(), _without(changes):
                    program()
                if failed:
                    numbers = ", ".join(map(str, failed))
                    _say(f"error: {len(failed)} jobs of this sweep failed: {numbers}")
                    sys.exit(FAILURE)
            except KeyboardInterrupt:
                _say("interrupted")
                sys.exit(INTERRUPTED)
            except Exception as error:
                # Nothing of ours has run before: what Hydra cannot compose is the user's.
                unreadable = not composed and isinstance(error, ValueError | OSError)
                if full_error or not (unreadable or _is_expected(error)):
                    raise
                _exit_with(error)

        return main

    return decorate


def _changes(config_name: str) -> list[str]:
    """The overrides on the command line that are for a run: of keys that a training alone has."""
    own = set(OmegaConf.load(config_dir() / f"{config_name}.yaml"))
    keys = _training_keys() - {*map(str, own), "defaults", "hydra"}
    return [
        argument
        for argument in sys.argv[1:]
        if re.split(r"[.=@]", argument.lstrip("+~"))[0] in keys and not argument.startswith("-")
    ]


def _training_keys() -> set[str]:
    """The groups, the keys of a training's own file, and the one that a model's file adds."""
    folders = {path.name for path in config_dir().iterdir() if path.is_dir()}
    return {*folders, *map(str, OmegaConf.load(config_dir() / "config.yaml")), "sparse"}


@contextlib.contextmanager
def _without(arguments: list[str]) -> Iterator[None]:
    """Leave out some arguments of the command line for a while."""
    before = sys.argv
    sys.argv = [argument for argument in before if argument not in arguments]
    try:
        yield
    finally:
        sys.argv = before


def _meet_peers() -> None:
    """Let the tasks of a job of submitit be the processes of one run, as those of torchrun are."""
    if "SUBMITIT_EXECUTOR" in os.environ and "WORLD_SIZE" not in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        peers = TorchDistributedEnvironment()
        if peers.world_size > 1:
            peers.export(set_cuda_visible_devices=False)


def _ask_for_requeue(signum: int) -> None:
    """Let submitit put a job back into the queue that was warned, and has saved its work.

    It listens to one of the signals with which schedulers warn, and does so in the handler that it
    had before the run began. After others the scheduler itself knows what to do with the job.
    """
    if signum in WARNINGS and "SUBMITIT_EXECUTOR" in os.environ:
        name = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")
        signal.raise_signal(signal.Signals[f"SIG{name}"])


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"warning: {printable(record.getMessage())}")


def _hear(package: str) -> None:
    """Say what a package warns of as we say everything else, not as Hydra's log has it."""
    logger = logging.getLogger(package)
    logger.handlers, logger.propagate = [_Said(logging.WARNING)], False


@contextlib.contextmanager
def _raising_hydra() -> Iterator[None]:
    """Let Hydra raise its errors, which it would print otherwise."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextlib.contextmanager
def _lazy_help() -> Iterator[None]:
    """Let Hydra give its parser help that is made when shown, which Python 3.14 refuses.

    Hydra up to 1.3.8 does so (facebookresearch/hydra, issue 3121).
    """
    refuse = getattr(argparse.ArgumentParser, "_check_help", None)
    if refuse is None:
        yield
        return

    def refuse_strings(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
        if isinstance(action.help, str):
            refuse(parser, action)

    setattr(argparse.ArgumentParser, "_check_help", refuse_strings)  # noqa: B010
    try:
        yield
    finally:
        setattr(argparse.ArgumentParser, "_check_help", refuse)  # noqa: B010


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """End the program as `command_line` does, where a block without a config of its own fails."""
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        with _raising_hydra():
            yield
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if full_error or not _is_expected(error):
            raise
        _exit_with(error)


def explain(error: BaseException) -> str:
    """One line for an expected error, naming the key and what would be right where known."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if not group:
            return f"--config-name: {config_dir()} has no {option}.yaml"
        if option.startswith("submitit_"):
            return f"{group}={option}: expected hydra-submitit-launcher, the extra `cluster`"
        group, *rest = f"{group}/{option}".split("/")
        # Those of --config-dir too.
        names = {*options(group), *(name for name in error.options or () if name[0] != "_")}
        chosen = "/".join(rest)
        return f"{group}={chosen}: unknown option; choose from {', '.join(sorted(names))}"
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        return explain(cause)
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        node, name = error.parent_node, str(error.key)
        if not isinstance(node, DictConfig):
            return f"{error.full_key}: unknown key{closest(name, ())}"
        # A key of the run that was looked for in one of its parts: trainer.device.
        outside = name in node._get_root()
        hint = f"; did you mean just {name}?" if outside else closest(name, map(str, node))
        return f"{error.full_key}: unknown key{hint}"
    if isinstance(error, OmegaConfBaseException):
        first_line = str(error).partition("\n")[0]
        return f"{error.full_key}: {first_line}" if error.full_key else first_line
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"{error.name}: {error.reason} (character {error.position})"
    if isinstance(error, UnicodeEncodeError):
        return not_letters(error.object)
    if isinstance(error, UnicodeDecodeError):
        return f"{_undecodable() or config_dir()}: not UTF-8 ({error.reason})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, Exception) and _is_of_a_peer(error):
        return "another process of this run has ended"
    if is_lack_of_memory(error):
        first_line = str(error).partition("\n")[0]
        return f"out of memory ({first_line}); smaller batches or a smaller model take less"
    if several := re.match(r"Ambiguous value for argument '(.*)'\n", str(error)):
        return ambiguous(several[1])
    return " ".join(str(error).split())


def _is_expected(error: Exception) -> bool:
    if is_lack_of_memory(error) or _is_of_a_peer(error):
        return True
    if isinstance(error, OSError) and not isinstance(error, MissingConfigException):
        # What names a file is about a file of the user: missing, read-only, of too long a name.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return full or error.filename is not None
    if isinstance(error, UnicodeEncodeError):  # the name of a file, in letters this process has not
        return error.encoding == sys.getfilesystemencoding() != "utf-8"
    return isinstance(error, UserError | HydraException | OmegaConfBaseException | yaml.YAMLError)


def _is_of_a_peer(error: Exception) -> bool:
    """Whether this process lost another one of its run, which says why itself."""
    lost = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "recvBytes")
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return several and isinstance(error, RuntimeError) and any(sign in str(error) for sign in lost)


def _undecodable() -> str | None:
    """File and line in conf/ that cannot be decoded; the error itself names neither."""
    for path in sorted(config_dir().rglob("*.yaml")):
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            return f"{path}, line {line}"
    return None


def _require_keys() -> None:
    """Refuse chosen files that hold no keys: empty ones, lists, single words. Hydra skips them."""
    runtime = HydraConfig.get().runtime
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    for group, option in runtime.choices.items():
        for path in (folder / group / f"{option}.yaml" for folder in folders):
            if not path.is_file():
                continue
            with reading(group, path, "a mapping of keys"):
                if not isinstance(yaml.compose(path.read_text("utf-8")), yaml.MappingNode):
                    raise UserError(f"{path}: expected a mapping of keys")


def _help(config_name: str) -> str:
    """The text of --help. Unlike Hydra's own it leaves out files that are parts of others."""
    text = OmegaConf.load(config_dir() / f"{config_name}.yaml").hydra.help.template
    folders = sorted(path.name for path in config_dir().iterdir() if path.is_dir())
    groups = [f"{name}: {', '.join(options(name))}\n" for name in folders if name != "hydra"]
    return str(text).replace("$APP_CONFIG_GROUPS", "".join(groups))


def _job_name() -> str:
    config = HydraConfig.get()
    if config.mode is not RunMode.MULTIRUN:
        return ""
    return f"job {config.job.num} ({' '.join(config.overrides.task)}): "


def _process() -> str:
    """Names this process of a run where it is not process 0."""
    # What all processes of a run meet, process 0 has said; and the launcher has ended the others.
    if rank := os.environ.get("RANK", "0").strip("0"):
        time.sleep(SECONDS_TO_BE_ENDED)
        return f"process {rank}: "
    return ""


def _exit_with(error: Exception) -> NoReturn:
    _say(f"error: {_process()}{explain(error)}")
    sys.exit(USAGE if isinstance(error, OverrideParseException) else FAILURE)


def _say(message: str) -> None:
    if len(message) > LONGEST_LINE:  # with a value that nobody reads to its end
        message = f"{message[: LONGEST_LINE // 2]} ... {message[-LONGEST_LINE // 2 :]}"
    sys.stderr.write(f"padst_exp: {printable(message)}\n")
