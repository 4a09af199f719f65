"""Runs as processes of this machine, as many at a time as it has cores or GPUs."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType

from padst_exp.engine.interruption import Interrupted, Interruption
from padst_exp.errors import UserError
from padst_exp.messages import say
from padst_exp.sweeps.board import Board

POLL_S = 0.1
ERROR = "padst_exp: error: "
# Imports of a run take seconds. They are done once: processes are forks of one that has them.
IMPORTED = ["padst_exp.restore", "padst_exp.engine.plots", "torch._dynamo", "timm", "transformers"]


@dataclass
class _Running:
    number: int
    process: ForkServerProcess
    slot: int
    log: Path

    def send(self, signum: int) -> None:
        """Signal it, unless it has ended."""
        if self.process.pid is not None and self.process.exitcode is None:
            os.kill(self.process.pid, signum)


class Pool:
    """Runs programs side by side until all have ended.

    Args:
        size: how many at a time; None: as many as GPUs, or as cores where there is no GPU.
        gpus: to be used, as CUDA_VISIBLE_DEVICES names them; each program sees one.
        logs: folder for what the programs write.
        label: what a program is run for.
        outcome: what came out of it, once it has ended well.
    """

    def __init__(
        self,
        *,
        size: int | None,
        gpus: Sequence[str],
        logs: Path,
        label: Callable[[int], str],
        outcome: Callable[[int], str],
    ) -> None:
        self.size = size or len(gpus) or cores()
        self.gpus, self.logs = gpus, logs
        self.label, self.outcome = label, outcome

    def run(self, commands: Sequence[Sequence[str]], first: int = 0) -> list[str | None]:
        """Run all, and say of each how it ended.

        Args:
            commands: a module and its arguments, for each process. Its `main` is what runs.
            first: number of the first command.

        Returns:
            For each command why it failed, or None.

        Raises:
            Interrupted: this process was asked to end. It has passed that on, and waited until all
                had saved their work.
        """
        left = list(enumerate(commands, first))
        size = min(self.size, max(1, len(left)))
        running: list[_Running] = []
        failures: dict[int, str | None] = {}
        board = Board(len(left), size)
        threads = max(1, cores() // size)
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            with Interruption() as interruption:
                asked = False
                while left or running:
                    if interruption.signum is not None and not asked:
                        asked, left = True, []
                        for each in running:
                            each.send(interruption.signum)
                    while left and len(running) < size:
                        free = next(n for n in range(size) if all(n != r.slot for r in running))
                        running.append(self._start(*left.pop(0), free, threads))
                    board.show(running=len(running))
                    time.sleep(POLL_S)
                    for each in [r for r in running if r.process.exitcode is not None]:
                        running.remove(each)
                        failures[each.number] = self._failure(each)
                        if not asked:
                            self._tell(board, each, failures[each.number], len(running))
            if interruption.signum is not None:
                say("sweep interrupted; the same command goes on with it")
                raise Interrupted(interruption.signum)
        finally:
            board.close()
            for each in running:
                each.send(signal.SIGTERM)
            for each in running:
                each.process.join()
        return [failures[number] for number in sorted(failures)]

    def _start(self, number: int, command: Sequence[str], slot: int, threads: int) -> _Running:
        gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
        log = self.logs / f"{number}.log"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        process = context.Process(target=_run, args=(command, log.absolute(), gpu, threads))
        with _no_main():
            process.start()
        return _Running(number, process, slot, log)

    def _failure(self, ended: _Running) -> str | None:
        status = ended.process.exitcode
        assert status is not None
        if status == 0:
            return None
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        lines = ended.log.read_text(errors="backslashreplace").split("\n")
        said = [line for line in lines if line.strip()] or [f"status {status}"]
        errors = [line.removeprefix(ERROR) for line in said if line.startswith(ERROR)]
        return (errors or said)[-1]

    def _tell(self, board: Board, ended: _Running, failure: str | None, running: int) -> None:
        what = self.label(ended.number)
        if failure is None:
            board.count(failed=False, running=running)
            say(f"{board}: {what}: {self.outcome(ended.number)}")
        else:
            board.count(failed=True, running=running)
            say(f"{board}: {what} failed: {failure} (all it said: {ended.log})")


@contextmanager
def _no_main() -> Iterator[None]:
    """Without the program that runs, which multiprocessing would import anew in each process."""
    program, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def visible_gpus(device: str) -> list[str]:
    """GPUs that runs with `device` would choose from, as CUDA_VISIBLE_DEVICES names them."""
    if device == "cpu":
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]


def command(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The command of one run of a sweep.

    Args:
        arguments: of the sweep itself, without what it is a sweep of.
        overrides: of the run.

    Raises:
        UserError: the sweep is itself one of several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "hydra/launcher: expected basic under torchrun, which is for one run at a time"
        )
    own = [word for word in arguments if word not in ("-m", "--multirun")]
    return ["padst_exp.train", *own, *overrides, "hydra.mode=RUN"]


def _run(command: Sequence[str], log: Path, gpu: str | None, threads: int) -> None:
    """In a process that was just made: what `python -m` does, with output in `log`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if torch := sys.modules.get("torch"):  # which has read it where it was imported before
            torch.set_num_threads(threads)
    module = importlib.import_module(command[0])
    sys.argv = [str(module.__file__), *command[1:]]
    try:
        module.main()
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter, which this is not


def _end_with_parent() -> None:
    """Ask this process to end once the one that made it has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
