"""Runs as processes of this machine, as many at a time as it has cores or GPUs."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from padst_exp.engine.interruption import Interrupted, Interruption
from padst_exp.errors import UserError
from padst_exp.messages import say
from padst_exp.sweeps.board import Board

POLL_S = 0.1
ERROR = "padst_exp: error: "
_PR_SET_PDEATHSIG = 1


@dataclass
class _Running:
    number: int
    process: subprocess.Popen[bytes]
    slot: int
    log: Path


class Pool:
    """Runs commands side by side until all have ended.

    Args:
        size: how many at a time; None: as many as GPUs, or as cores where there is no GPU.
        gpus: to be used, as CUDA_VISIBLE_DEVICES names them; each command sees one.
        logs: folder for what the commands write.
        label: what a command is for.
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
            commands: arguments of each process.
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
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            with Interruption() as interruption:
                asked = False
                while left or running:
                    if interruption.signum is not None and not asked:
                        asked, left = True, []
                        for each in running:
                            each.process.send_signal(interruption.signum)
                    while left and len(running) < size:
                        free = next(n for n in range(size) if all(n != r.slot for r in running))
                        running.append(self._start(*left.pop(0), free, size))
                    board.show(running=len(running))
                    time.sleep(POLL_S)
                    for each in [r for r in running if r.process.poll() is not None]:
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
                each.process.terminate()
            for each in running:
                each.process.wait()
        return [failures[number] for number in sorted(failures)]

    def _start(self, number: int, command: Sequence[str], slot: int, size: int) -> _Running:
        environment = {"OMP_NUM_THREADS": str(max(1, cores() // size)), **os.environ}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        log = self.logs / f"{number}.log"
        with open(log, "ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=_end_with_parent,
            )
        return _Running(number, process, slot, log)

    def _failure(self, ended: _Running) -> str | None:
        status = ended.process.returncode
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
    module = "padst_exp.train"
    own = [word for word in arguments if word not in ("-m", "--multirun")]
    return [sys.executable, "-m", module, *own, *overrides, "hydra.mode=RUN"]


def _end_with_parent() -> None:
    """In a process that was just made: be asked to end when the one that made it has died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
