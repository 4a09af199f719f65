"""What a run does when it, its group, its workers or its terminal are told to end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from engine.toy import (
    MICRO_BATCHES,
    STEPS,
    Samples,
    ToyTask,
    assert_equal,
    assert_same_run,
    start_ranks,
    toy_layers,
    toy_run,
    toy_trainer,
)
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.engine.ema import Average
from padst_exp.engine.interruption import Interrupted, Interruption, ending_at_once
from padst_exp.engine.progress import Progress
from padst_exp.engine.records import read_metrics
from padst_exp.engine.run_directory import RunDirectory
from padst_exp.errors import UserError
from padst_exp.signals import ENDING, REQUEUE


def endless(world: World, root: Path, workers: int, method: str = "fork") -> None:
    """A run that only a signal ends, in a group of its own, whose checkpoints nothing else asks."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method(method, force=True)
    trainer = toy_trainer(
        steps=10**6, workers=workers, eval_interval=None, checkpoint_interval=None, log_interval=2
    )
    toy_run(root, world=world, trainer=trainer)


@pytest.fixture
def start() -> Iterator[Callable[..., list[ForkServerProcess]]]:
    """Starts ranks that do not outlive the test."""
    started: list[ForkServerProcess] = []

    def begin(*arguments: Any, ranks: int = 1) -> list[ForkServerProcess]:
        processes = start_ranks(*arguments, ranks=ranks)
        started.extend(processes)
        return processes

    yield begin
    for process in started:
        process.kill()
        process.join()


Start = Callable[..., list[ForkServerProcess]]


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def training(root: Path) -> bool:
    return len(read_metrics(root / "toy" / "metrics.jsonl")) > 2


def saved_step(root: Path) -> int:
    step: int = checkpoint.read(root / "toy" / "checkpoints" / "last.pt")["step"]
    return step


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_signals_to_the_group_leave_a_checkpoint_and_no_worker(
    tmp_path: Path, start: Start
) -> None:
    for signum, workers in (
        (signal.SIGTERM, 2),
        (signal.SIGINT, 0),
        (signal.SIGHUP, 2),
        (signal.SIGUSR1, 0),
    ):
        root = tmp_path / signum.name
        (process,) = start(endless, root, workers)
        wait_for(lambda root=root: training(root))
        pids = children(process.pid)
        assert len(pids) == workers
        for _ in range(3):  # as `timeout` and launchers do, which pass on what came already
            os.killpg(process.pid, signum)
            time.sleep(0.002)
        process.join(60)
        warned = signum in (signal.SIGUSR1, signal.SIGUSR2)
        assert process.exitcode == (REQUEUE if warned else 128 + signum)
        assert saved_step(root) >= 4
        assert not any(alive(pid) for pid in pids)


@pytest.mark.slow
def test_workers_of_a_fork_server_leave_signals_to_the_run_too(
    tmp_path: Path, start: Start
) -> None:
    (process,) = start(endless, tmp_path, 2, "forkserver")
    wait_for(lambda: training(tmp_path))
    (server,) = (pid for pid in children(process.pid) if children(pid))
    workers = children(server)
    assert len(workers) == 2
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert saved_step(tmp_path) >= 4
    wait_for(lambda: not any(alive(pid) for pid in (server, *workers)), seconds=5)


@pytest.mark.slow
def test_workers_do_not_heed_signals_and_die_with_the_run(tmp_path: Path, start: Start) -> None:
    (process,) = start(endless, tmp_path, 2)
    wait_for(lambda: training(tmp_path))
    pids = children(process.pid)
    for pid in pids:
        for signum in ENDING:
            os.kill(pid, signum)
    rows = len(read_metrics(tmp_path / "toy" / "metrics.jsonl"))
    wait_for(lambda: len(read_metrics(tmp_path / "toy" / "metrics.jsonl")) > rows + 5)
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.join()
    wait_for(lambda: not any(alive(pid) for pid in pids), seconds=3)


def failing(world: World, root: Path, workers: int, method: str) -> None:
    try:
        endless(world, root, workers, method)
    except UserError as error:
        (root / f"error{world.rank}").write_text(str(error))


def workers_of(pid: int, method: str) -> list[int]:
    """What loads data for a run; neither a fork server nor what tracks resources does."""
    found = [
        child
        for child in children(pid)
        if "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text()
    ]
    return [of for child in found for of in children(child)] if method == "forkserver" else found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_killed_worker_is_told_in_one_line_and_loses_nothing(
    method: str, tmp_path: Path, start: Start
) -> None:
    (process,) = start(failing, tmp_path, 2, method)
    wait_for(lambda: training(tmp_path))
    workers = workers_of(process.pid, method)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    process.join(60)
    line = (tmp_path / "error0").read_text()
    assert line.startswith("trainer.workers: ") and "SIGKILL" in line and "\n" not in line
    assert saved_step(tmp_path) >= 4
    assert not any(alive(pid) for pid in workers)


@pytest.mark.thorough
def test_a_whole_run_is_the_same_under_each_start_method(tmp_path: Path) -> None:
    """As a command, whose own module its workers import again."""
    small = "model.dim=16 model.depth=1 model.heads=2 trainer.epochs=null trainer.steps=3"
    rest = f"backend=torch logger=none device=cpu runs={tmp_path}"
    found = []
    for method in ("fork", "spawn", "forkserver"):
        program = tmp_path / "program.py"
        program.write_text(
            "import multiprocessing\n"
            "if __name__ == '__main__':\n"
            f"    multiprocessing.set_start_method('{method}')\n"
            "    from padst_exp.train import main\n"
            "    main()\n"
        )
        arguments = [*small.split(), *rest.split(), f"name={method}", "trainer.workers=2"]
        done = subprocess.run(
            [sys.executable, str(program), *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        found.append(checkpoint.read(tmp_path / method / "checkpoints" / "last.pt")["model"])
    for other in found[1:]:
        assert_equal(other, found[0], "model")


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_at_one_step(tmp_path: Path, start: Start) -> None:
    processes = start(endless, tmp_path, 0, ranks=2)
    wait_for(lambda: training(tmp_path))
    os.kill(processes[1].pid, signal.SIGUSR1)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [REQUEUE, REQUEUE]
    assert len(checkpoint.read(tmp_path / "toy" / "checkpoints" / "last.pt")["random"]) == 2


class Damaged(Samples):
    """Has a sample that cannot be read, in a data set that other ranks read well."""

    def __init__(self, size: int, seed: int, index: int) -> None:
        super().__init__(size, seed)
        self.index = index

    def __getitem__(self, address: tuple[int, int] | int) -> tuple[Tensor, Tensor]:
        if address == (2, self.index) or address == self.index:
            raise UserError("dataset.root: expected an image, got b.jpg (it is cut)")
        return super().__getitem__(address)


def with_damage(world: World, root: Path, where: str) -> None:
    task = ToyTask()
    damaged = Damaged(96 if where == "train" else 40, 1 if where == "train" else 2, 20)
    setattr(task, where, damaged)
    try:
        toy_run(root, world=world, task=task, trainer=toy_trainer(checkpoint_interval=None))
    except UserError as error:
        (root / f"error{world.rank}").write_text(str(error))


@pytest.mark.slow
def test_a_sample_that_cannot_be_read_costs_no_step(tmp_path: Path, start: Start) -> None:
    toy_run(tmp_path, name="straight", trainer=toy_trainer(checkpoint_interval=None))
    for ranks in (1, 2):
        for where in ("train", "validation"):
            root = tmp_path / f"{where}{ranks}"
            if ranks == 1:
                with_damage(World(), root, where)
            else:
                for process in start(with_damage, root, where, ranks=2):
                    process.join(60)
            lines = [path.read_text() for path in sorted(root.glob("error*"))]
            assert len(lines) == ranks and all("got b.jpg (it is cut)" in line for line in lines)
            steps = 96 // 16
            if where == "train":
                assert 2 * steps <= saved_step(root) < 3 * steps
            else:
                assert saved_step(root) == 10
            if ranks == 1:
                toy_run(root, trainer=toy_trainer(checkpoint_interval=None))
                assert_same_run(tmp_path / "straight", root / "toy")


def test_an_error_in_a_pass_loses_no_step_either(tmp_path: Path) -> None:
    def model() -> nn.Module:
        layers = toy_layers()
        layers.insert(1, nn.BatchNorm1d(32))
        return layers

    toy_run(tmp_path, name="straight", model=model())
    for micro in (1, 2):  # in the second of a step, statistics and generators have moved on
        root = tmp_path / str(micro)
        with pytest.raises(ConnectionError):
            toy_run(root, task=ToyTask(fail_at=MICRO_BATCHES * 6 + micro), model=model())
        torch.manual_seed(5)
        assert saved_step(root) == 6
        toy_run(root, model=model())
        assert_same_run(tmp_path / "straight", root / "toy")


class Failing(ToyTask):
    """Fails on rank 1, in one step: before, in or after the forward pass of a micro-batch."""

    def __init__(self, where: str, step: int) -> None:
        super().__init__()
        self.where, self.at = where, MICRO_BATCHES * step

    def _fail(self, *_: object) -> None:
        if os.environ["RANK"] == "1":
            raise ConnectionError("power cut")

    def augment(self, inputs: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        if self.where == "before" and self.losses == self.at - MICRO_BATCHES:
            self._fail()
        return super().augment(inputs, targets, seed)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = super().loss(logits, targets)
        if torch.is_grad_enabled() and self.losses == self.at:
            if self.where == "in":
                self._fail()
            elif self.where == "after":
                loss.register_hook(self._fail)
        return loss


def failing_in_a_pass(world: World, root: Path, where: str, step: int) -> None:
    def say(progress: Progress, line: str) -> None:
        if progress.shown:
            with (root / "said").open("a") as file:
                file.write(f"{line}\n")

    with mock.patch.object(Progress, "say", say):
        try:
            toy_run(root, world=world, task=Failing(where, step))
        except Exception as error:
            (root / f"error{world.rank}").write_text(str(error))
            os._exit(1)  # as a process ends, connections and all


@pytest.mark.slow
def test_an_error_in_a_pass_of_one_rank(tmp_path: Path, start: Start) -> None:
    """All save the step before it; where gradients are on their way, one line says what is left."""
    for where, step, saved in (("before", 2, 1), ("in", 7, 6), ("after", 7, 4)):
        root = tmp_path / where
        root.mkdir()
        for process in start(failing_in_a_pass, root, where, step, ranks=2):
            process.join(60)
            assert process.exitcode == 1, where
        assert saved_step(root) == saved
        last = root / "toy" / "checkpoints" / "last.pt"
        line = (root / "said").read_text().splitlines()[-1]
        if where == "after":
            assert line == f"failed; {last} holds step 4, where resume=auto continues"
            continue
        assert line == f"failed at step {saved}, saved in {last}; resume=auto continues"
        assert (root / "error1").read_text() == "power cut"
        assert (root / "error0").read_text() == "process 1 of 2 failed: power cut"
        assert len(checkpoint.read(last)["random"]) == 2


def test_an_error_amid_a_change_says_where_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    update = Average.update
    for at in (3, 6):

        def full(average: Average, step: int) -> None:
            if step == at:  # noqa: B023
                raise MemoryError
            update(average, step)

        root = tmp_path / str(at)
        with mock.patch.object(Average, "update", full), pytest.raises(MemoryError):
            toy_run(root)
        last = root / "toy" / "checkpoints" / "last.pt"
        line = capsys.readouterr().err.splitlines()[-1]
        if at == 3:
            assert not last.exists()
            assert line == "failed before anything was saved; resume=auto starts from the beginning"
        else:
            assert saved_step(root) == 4
            assert line == f"failed; {last} holds step 4, where resume=auto continues"


def test_an_error_after_a_step_saves_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RunDirectory.append

    def full(directory: RunDirectory, row: dict[str, Any]) -> None:
        if row["step"] == 9:
            raise OSError(28, "No space left on device")
        append(directory, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append", full)
        with pytest.raises(OSError, match="No space left"):
            toy_run(tmp_path)
    assert saved_step(tmp_path) == 9


def test_a_signal_amid_an_evaluation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    trainer = {"eval_batch_size": 4, "checkpoint_interval": None}
    toy_run(tmp_path, name="straight", trainer=toy_trainer(**trainer))
    for step in (10, STEPS):

        class Signalled(ToyTask):
            evaluated = 0

            def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
                self.evaluated += self.losses == MICRO_BATCHES * step  # noqa: B023
                if self.evaluated == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                assert self.evaluated < 5
                return super().metrics(logits, targets)

        root = tmp_path / str(step)
        with pytest.raises(Interrupted):
            toy_run(root, task=Signalled(), trainer=toy_trainer(**trainer))
        assert saved_step(root) == step
        assert not (root / "toy" / "summary.json").exists()
        toy_run(root, trainer=toy_trainer(**trainer))
        assert_same_run(tmp_path / "straight", root / "toy")


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ending_at_once(), Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_an_impatient_person_ends_a_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Interruption() as interruption:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            now[0] += 60
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    for signum in ENDING:
        with Interruption() as interruption:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signum)
        assert interruption.signum == signum


def test_without_anything_to_save_a_signal_acts_at_once() -> None:
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        with pytest.raises(Interrupted) as caught, ending_at_once():
            os.kill(os.getpid(), signum)
        assert caught.value.code == (143 if signum == signal.SIGTERM else REQUEUE)
