"""The training loop: steps, evaluations, checkpoints, metrics."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from padst_exp import dispatch
from padst_exp.data.sampler import Batches, train_loader, validation_loader
from padst_exp.data.stream import TextStream
from padst_exp.data.task import Batch
from padst_exp.dispatch import Pick
from padst_exp.dst import Periodic
from padst_exp.engine.backends import (
    choose_again,
    choose_backends,
    describe,
    octaves,
    summarize_backends,
)
from padst_exp.engine.checkpoint import require_same_config, restoring
from padst_exp.engine.distributed import World
from padst_exp.engine.efficiency import Efficiency, energy_meter, flops_per_step, peak_of
from padst_exp.engine.environment import changed, numerics
from padst_exp.engine.evaluation import LostError, evaluate
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.interruption import Interrupted, Interruption
from padst_exp.engine.loggers import numbers
from padst_exp.engine.placement import placement_of
from padst_exp.engine.plots import plot_curves, plot_topologies
from padst_exp.engine.profiling import StepProfiler
from padst_exp.engine.progress import Progress
from padst_exp.engine.records import read_metrics
from padst_exp.engine.run_directory import RunDirectory
from padst_exp.engine.state import TrainingState
from padst_exp.engine.step import DivergedError, PassError, Stepper, eagerly
from padst_exp.engine.summary import summarize
from padst_exp.errors import UserError
from padst_exp.identity import differences
from padst_exp.messages import say
from padst_exp.soft import soft_choices


def run(experiment: Experiment, directory: RunDirectory, world: World) -> dict[str, Any]:
    """Train to the end, from the last checkpoint in `directory` if there is one.

    A run that is finished already is not repeated.

    Args:
        experiment: what is trained and how; its model is on the CPU still.
        directory: of the run; the same on every rank.
        world: from `distributed.start`.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        UserError: when the training diverges, the disk is full, or the checkpoint is damaged or
            of another configuration. The last good checkpoint stays.
        Interrupted: after a signal that asks for the end, once the state is saved.
    """
    try:
        if world.from_main(directory.finished):
            if world.main:
                say("finished before; resume=never trains again")
            return directory.summary()
        return _run(experiment, directory, world)
    finally:
        directory.close()


def _run(experiment: Experiment, directory: RunDirectory, world: World) -> dict[str, Any]:
    training: _Training | None = None
    try:
        data = require_same_task(experiment, directory, world)
        if world.main:
            announce(experiment, directory, world)
        training = _Training(experiment, directory, world, data)
        with Interruption() as interruption:
            training.train(interruption)
            return training.finish()
    except BaseException as error:
        if training is not None:
            training.abort(error)
        if isinstance(error, UserError) and (training is None or training.state.step == 0):
            directory.discard()  # refused, not failed
        if isinstance(error, DivergedError):
            last = directory.checkpoints.last
            kept = f"the last good one is {last}" if last.exists() else "there is no checkpoint"
            raise UserError(
                f"training diverged: {error}; {kept}; lower optimizer.lr or set trainer.clip_norm"
            ) from error
        raise


def announce(experiment: Experiment, directory: RunDirectory, world: World) -> None:
    """Say what is about to be trained, and where."""
    report = experiment.report
    say(f"{report}; {experiment.total_steps} steps on {world.device}, in {directory.path}")
    algorithm, total = experiment.algorithm, experiment.total_steps
    if isinstance(algorithm, Periodic) and any(not layer.static for layer in report.layers):
        ends = algorithm.interval, math.ceil(algorithm.stop * total)
        if not any(algorithm.is_due(step, total) for step in ends):
            spans = f"dst.interval={algorithm.interval}, dst.stop={algorithm.stop}"
            say(f"no topology ever changes: no update is due in {total} steps ({spans})")
    if (flops := report.flops()) is not None:
        say(f"a forward pass takes {flops:.4f} of the FLOPs of the model before its transform")


def require_same_task(
    experiment: Experiment, directory: RunDirectory, world: World
) -> dict[str, int | str]:
    """Make sure that all ranks were given the same configuration and see the same data.

    Returns:
        What the data are.

    Raises:
        UserError: names what differs.
    """
    data = experiment.task.describe()
    given = world.gather((dict(directory.config), data))
    for rank, (config, seen) in enumerate(given):
        for difference in differences(given[0][0], config):
            raise UserError(f"processes 0 and {rank} were given {difference}, expected the same")
        if seen != given[0][1]:
            raise UserError(
                f"dataset: expected the same data in every process, got {_told(given[0][1])} in "
                f"process 0 and {_told(seen)} in process {rank}"
            )
    return data


def _told(data: Mapping[str, int | str]) -> str:
    counts = [f"{count:,} {name}" for name, count in data.items() if isinstance(count, int)]
    return f"{' and '.join(counts)} samples ({data.get('fingerprint')})"


class _Asked(Exception):
    """The run was asked to end amid an evaluation."""


class _Training:
    """One run: steps, the evaluations and checkpoints between them, and what is logged of both."""

    def __init__(
        self,
        experiment: Experiment,
        directory: RunDirectory,
        world: World,
        data: dict[str, int | str],
    ) -> None:
        self.experiment, self.directory, self.world = experiment, directory, world
        self.data = data
        self.task, self.trainer = experiment.task, experiment.trainer
        self.logger, self.total = experiment.logger, experiment.total_steps
        placement = placement_of(self.trainer.parallel, world)
        path, saved = directory.checkpoints.last, directory.checkpoints.load(placement.read)
        if saved is not None:
            require_same_config(saved["config"], directory.config, path)
            if saved["data"] != data:
                raise UserError(
                    f"{path}: other data than before, {_told(saved['data'])} then and "
                    f"{_told(data)} now; choose another name, or resume=never"
                )
        else:
            StepProfiler.require_steps(self.trainer.profile, self.total)
        experiment.model.to(world.device)
        if self.trainer.precision == "float64":
            experiment.model.double()
        self.picks: dict[str, Pick] = {}
        self.flops: int | None = None
        self.state = TrainingState(
            experiment,
            placement=placement,
            saved=saved,
            path=path,
            prepare=lambda: self.prepare(saved),
        )
        self.take(self.picks)
        self.stepper = Stepper(experiment, self.state, record=self.record, say=self.say)
        self.numerics = numerics(world.device)
        self.apart = ""
        self.loader: Batches
        self.position: Tensor | None = None  # of a stream, after the last step
        if saved is not None:
            if isinstance(self.task.train, TextStream):
                with restoring(path, "stream"):
                    self.task.train.require_position(saved["stream"])
                    self.position = saved["stream"].chunk(world.size)[world.rank]
            with restoring(path, "backends"):
                self.apart = self.differing(saved)
        self.progress = Progress(total=self.total, step=self.state.step, shown=world.main)
        self.interruption = Interruption()
        self.left = False
        self.saved: int | None = None if saved is None else saved["step"]
        self.watched: float | None = None
        self.baselines: dict[str, float] = {}
        self.profiler = StepProfiler(
            self.trainer.profile if world.main else None,
            folder=directory.path / "profile",
            device=world.device,
            left=self.total - self.state.step,
            say=self.say,
        )
        self.joules = energy_meter(world.device)
        self.started = self.mark = time.perf_counter()
        self.waited = 0.0
        self.first_step = self.marked_step = self.state.step

    def prepare(self, saved: Mapping[str, Any] | None) -> None:
        """Look at the model as long as every rank has all of it."""
        backends = None if saved is None else saved["backends"]
        # Those of a checkpoint were chosen at the density that it has.
        self.picks = choose_backends(self.experiment, world=self.world, saved=backends)
        # What permutations cost while they are soft is not what they cost in the end.
        if self.trainer.parallel == "fsdp" and not soft_choices(self.experiment.model):
            self.flops = self.flops_per_step()

    def flops_per_step(self) -> int | None:
        """FLOPs of a step, as the model is; None where they cannot be counted."""
        model, trainer = self.experiment.model, self.trainer
        return flops_per_step(model, self.task, trainer, self.world.device)

    def train(self, interruption: Interruption) -> None:
        """Do all steps that are left."""
        state, trainer = self.state, self.trainer
        self.interruption = interruption
        evaluated = self.introduce()
        loader = train_loader(
            self.task,
            batch_size=trainer.batch_size,
            micro_batches=trainer.micro_batches,
            start_step=state.step,
            total_steps=self.total,
            seed=self.experiment.seed,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=trainer.workers,
            position=self.position,
        )
        self.loader, self.position = loader, loader.position
        state.start_generators(self.experiment.seed)
        self.joules_before = 0.0 if self.joules is None else self.joules()
        self.mark = time.perf_counter()
        if self.evaluation_due and not evaluated:  # the run ended amid it
            self.save(self.evaluate())
        with closing(iter(loader)) as batches:
            while state.step < self.total:
                failed: PassError | None = None
                try:
                    self.step(batches)
                except DivergedError:
                    raise
                except PassError as error:
                    failed = error
                except Exception as error:
                    if self.left:
                        raise
                    # Ranks that wait for this one cannot save with it.
                    if not self.stepper.sound or self.world.size > 1:
                        self.say(self.lost())
                        raise
                    self.leave(error)
                if failed is not None:
                    self.leave(failed.own)

    def lost(self) -> str:
        """Where a run goes on that ends without a word to the other ranks, or amid a change."""
        if self.saved is None:
            return "failed before anything was saved; resume=auto starts from the beginning"
        last = self.directory.checkpoints.last
        return f"failed; {last} holds step {self.saved}, where resume=auto continues"

    def step(self, batches: Iterator[Batch]) -> None:
        """One step, and what is due after it."""
        state, trainer = self.state, self.trainer
        self.stepper.step(iter(self.fetch(batches)))
        self.position = self.loader.position
        began = time.perf_counter()
        self.profiler.step()
        self.mark += time.perf_counter() - began
        self.follow_densities()
        self.progress.advance()
        at_end = state.step == self.total
        if at_end or _due(state.step, trainer.log_interval):
            self.log()
        is_best = self.evaluation_due and self.evaluate()
        if is_best or at_end or _due(state.step, trainer.checkpoint_interval):
            self.save(is_best)

    def take(self, picks: dict[str, Pick]) -> None:
        """Know what was picked at which densities; the average computes as the model does."""
        self.picks, self.octaves = picks, octaves(self.experiment.model)
        if self.state.average is not None:
            dispatch.reuse(self.state.average.model, picks)

    def follow_densities(self) -> None:
        """Measure again those layers whose density became another one by a factor of two."""
        if self.experiment.backend != "auto" or not self.stepper.resized:
            return
        self.stepper.resized = False
        now = octaves(self.experiment.model)
        if now == self.octaves:
            return
        kept = {name: pick for name, pick in self.picks.items() if now[name] == self.octaves[name]}
        self.take(choose_again(self.experiment, world=self.world, kept=kept))
        self.say(f"step {self.state.step}: {describe(self.picks)}")

    def fetch(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of the next step. All ranks go on, or all save the state and leave."""
        parts: list[Batch] = []
        error: Exception | None = None
        if self.interruption.signum is None:
            began = time.perf_counter()
            try:
                parts = self.stepper.parts(batches)
            except Exception as failure:
                error = failure
            self.waited += time.perf_counter() - began
        if self.world.largest(int(error is not None or self.interruption.signum is not None)):
            self.leave(error)
        return parts

    def leave(self, error: Exception | None) -> NoReturn:
        """Save the state, which is sound on every rank, and end by a signal or an `error`.

        Raises:
            Interrupted: a rank was asked to end.
            Exception: else `error`, or that of another rank.
        """
        self.left = True
        signum = max(self.world.gather(self.interruption.signum or 0))
        if not signum and not self.state.step:  # there is nothing to lose
            self.world.agree(error)
        where = f"at step {self.state.step}, saved in {self.directory.checkpoints.last}"
        try:
            self.save(False)
        except Exception as failure:
            if signum or error is None:
                raise
            where = f"at step {self.state.step}, not saved: {failure}"
        if signum:
            self.say(f"interrupted {where}; resume=auto continues")
            raise Interrupted(signum)
        self.say(f"failed {where}; resume=auto continues")
        self.world.agree(error)
        raise AssertionError("neither a signal nor an error")

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation belongs to the step that was done last."""
        step = self.state.step
        return step == self.total or (step > 0 and _due(step, self.trainer.eval_interval))

    def introduce(self) -> bool:
        """Open the logs and say what is to beat.

        Returns:
            Whether the evaluation that belongs to the last step is in the metrics.
        """
        return bool(self.world.from_main(self.world.first(self._introduce)))

    def _introduce(self) -> bool:
        step = self.state.step
        self.baselines = self.task.baselines()
        rows = self.directory.open_metrics(step)
        directory = self.directory
        self.logger.start(directory.path, directory.config, rows=rows, labels=directory.labels)
        if step:
            self.say(f"resumed at step {step} from {self.directory.checkpoints.last}")
        elif not self.directory.new:
            self.say(f"{self.directory.checkpoints.last} is not there: starting from the beginning")
        if self.apart:
            self.say(
                f"resumed with {self.apart}: the rest is no longer bitwise equal to a straight run"
            )
        if self.picks:
            self.say(describe(self.picks))
        for name, value in self.baselines.items():
            self.say(f"baseline {name} {value:.4g}")
        return any(row["kind"] == "eval" and row["step"] == step for row in rows)

    def differing(self, saved: Mapping[str, Any]) -> str:
        """What computes otherwise than before; empty where the rest will be bitwise equal."""
        parts = [changed(saved["environment"], self.numerics)]
        if (then_ranks := len(saved["random"])) != self.world.size:
            now = f"{self.world.size} process" + ("es" if self.world.size > 1 else "")
            parts.append(f"{now} instead of {then_ranks}")
        then = {name: pick["backend"] for name, pick in saved["backends"]["picks"].items()}
        other = [name for name, pick in self.picks.items() if then.get(name) != pick.backend]
        if other:
            parts.append(f"another backend of {len(other)} layers")
        return ", ".join(part for part in parts if part)

    def log(self) -> None:
        """Record the training metrics since the last time."""
        state = self.state
        self.stepper.settle()
        seconds = time.perf_counter() - self.mark
        speed = (state.step - self.marked_step) * self.trainer.batch_size / seconds
        values = {"loss": sum(state.losses) / len(state.losses), "lr": self.stepper.lr}
        if state.norms:
            values["grad_norm"] = sum(state.norms) / len(state.norms)
        if (samples := self.task.samples) is not None:
            values["epoch"] = state.step * self.trainer.batch_size / samples
        timing = {"seconds": seconds, "samples_per_second": speed}
        timing["input_wait_share"] = self.waited / seconds
        shown = f"{speed:,.0f} samples/s"
        if self.task.items_per_sample > 1:
            timing["tokens_per_second"] = speed * self.task.items_per_sample
            shown = f"{timing['tokens_per_second']:,.0f} tokens/s"
        self.record("train", values | timing)
        if soft := self.stepper.soft_metrics():
            self.record("soft", soft)
        metric = "" if self.watched is None else f"{self.task.monitor[0]} {self.watched:.4g}, "
        self.progress.show(f"loss {values['loss']:.4f}, {metric}{shown}")
        state.losses, state.norms = [], []
        self.mark, self.marked_step, self.waited = time.perf_counter(), state.step, 0.0

    def evaluate(self) -> bool:
        """Record the validation metrics; return whether they are the best so far.

        Where there is an average of the weights, its metrics are the ones that count. An error,
        or a signal, amid it ends the run with its state saved; who goes on evaluates first.
        """
        state, began = self.state, time.perf_counter()
        self.world.average_statistics(state.model)
        name, direction = self.task.monitor
        # Only the last ones are kept, and they cost a text its losses once more.
        outcomes: list[Tensor] | None = [] if state.step == self.total else None
        try:
            values = self.metrics_of(state.model, outcomes)
            self.watched = values[name]
            if state.average is not None:
                outcomes = None if outcomes is None else []
                averaged = self.metrics_of(state.average.model, outcomes)
                self.watched = averaged[name]
                values |= {f"ema_{key}": value for key, value in averaged.items()}
        except LostError:
            raise
        except Exception as error:
            self.leave(None if isinstance(error, _Asked) else error)
        if outcomes is not None:
            each = [part for parts in self.world.gather(outcomes) for part in parts]
            self.world.first(lambda: self.directory.keep_outcomes(each))
        self.record("eval", values)
        sign = 1 if direction == "max" else -1
        # NaN is never the best, and no reason against another.
        best = math.nan if state.best is None else state.best[0]
        is_best = not math.isnan(self.watched) and not sign * self.watched <= sign * best
        if is_best:
            state.best = (self.watched, state.step)
        self.mark += time.perf_counter() - began
        return is_best

    def metrics_of(self, model: nn.Module, outcomes: list[Tensor] | None) -> dict[str, float]:
        """Return the metrics of `model` on the validation set, and `outcomes` of its samples."""
        trainer = self.trainer
        batches = validation_loader(
            self.task,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=trainer.workers,
            batch_size=trainer.eval_batch_size or trainer.micro_batch_size(self.world.size),
        )
        # Its shapes and modes would have every block compiled anew, twice.
        with eagerly(trainer.compile):
            return evaluate(
                model,
                self.task,
                self.unless_asked(batches),
                precision=trainer.precision,
                placement=self.state.placement,
                outcomes=outcomes,
            )

    def unless_asked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, until the run is asked to end."""
        for batch in batches:
            if self.interruption.signum is not None:
                raise _Asked
            yield batch

    def save(self, is_best: bool) -> None:
        """Write a checkpoint, if the state is sound."""
        began = time.perf_counter()
        self.stepper.settle()
        if not self.state.is_finite():
            raise DivergedError("a weight is not finite", self.state.step)
        self.world.average_statistics(self.state.model)
        self.world.first(self.directory.require_held)
        payload = self.state.payload()
        if self.position is not None:
            payload["stream"] = torch.cat(self.world.gather(self.position))
        payload = self.state.placement.write(payload, self.directory.checkpoints.folder)
        self.world.first(lambda: self._write(payload, is_best))
        self.saved = self.state.step
        self.mark += time.perf_counter() - began

    def _write(self, payload: dict[str, Any], is_best: bool) -> None:
        # First the metrics, so that no checkpoint is ever ahead of them.
        self.directory.require_held()
        self.directory.sync_metrics()
        payload["data"] = self.data
        payload["environment"] = self.numerics
        payload["backends"] = dispatch.save(self.picks, self.world.device)
        payload["config"] = self.directory.config
        payload["config_text"] = self.directory.config_text
        self.directory.checkpoints.save(payload, is_best=is_best, keep_last=self.trainer.keep_last)

    def finish(self) -> dict[str, Any]:
        """Write the summary and the plots."""
        self.progress.close()
        summary = self.world.from_main(self.world.first(self._finish))
        assert summary is not None
        return summary

    def _finish(self) -> dict[str, Any]:
        path, state = self.directory.path, self.state
        rows = read_metrics(path / "metrics.jsonl")
        summary = summarize(
            rows,
            report=self.experiment.report,
            model=state.model,
            tracker=state.tracker,
            baselines=self.baselines,
            monitor=self.task.monitor,
            world=self.world,
            seconds=time.perf_counter() - self.started,
            efficiency=self.efficiency(),
        )
        summary["backends"] = summarize_backends(self.picks)
        plot_curves(rows, self.task.monitor[0], self.baselines, path / "curves.png")
        plot_topologies(state.model, state.tracker.initial, path / "topology.png")
        self.directory.finish(summary)
        self.logger.finish(summary)
        self.directory.close()
        return summary

    def efficiency(self) -> Efficiency:
        """What the steps of this process took."""
        trainer, device = self.trainer, self.world.device
        steps, joules = self.state.step - self.first_step, None
        if self.joules is not None and steps:
            used = self.joules() - self.joules_before
            joules = used * self.world.size / (steps * trainer.batch_size)
        peak, peak_from = peak_of(device, trainer)
        return Efficiency(
            batch_size=trainer.batch_size,
            flops_per_step=self.flops if self.state.placement.together else self.flops_per_step(),
            peak_flops=peak,
            peak_from=peak_from,
            joules_per_sample=joules,
        )

    def abort(self, error: BaseException) -> None:
        """Close the logs of a run that does not reach its end."""
        self.progress.close()
        self.profiler.close()
        if self.world.main:
            code = 128 + error.signum if isinstance(error, Interrupted) else 1
            self.logger.finish({}, exit_code=code)
            self.directory.close()

    def say(self, line: str) -> None:
        """Write a line for a person, on rank 0."""
        self.progress.say(line)

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """Write a row of `metrics.jsonl`; its numbers go to the logger as well."""
        if not self.world.main:
            return
        row = {"kind": kind, "step": self.state.step, **values}
        self.directory.append(row)
        self.logger.log(self.state.step, numbers(row))


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
