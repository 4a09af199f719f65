"""One sweep: what of it is there already, what is left to be run, and what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from padst_exp.config import config_hash, run_name
from padst_exp.engine.folders import newest
from padst_exp.engine.records import read_summary
from padst_exp.errors import UserError, require
from padst_exp.identity import replicate_hash
from padst_exp.messages import say
from padst_exp.overrides import assignment
from padst_exp.sweeps.jobs import Job
from padst_exp.train import run_settings

MANY = 50
"""Runs whose configs take so long to compose that a word is due."""

Load = Callable[[list[str]], DictConfig]
Launch = Callable[[list[list[str]], int], list[str | None]]


@dataclass(frozen=True)
class Planned:
    """A run of a sweep, with all that follows from its config.

    Args:
        job: what it is.
        overrides: that compose its config.
        runs: folder of run directories.
        name: of its own there.
        config_hash: of all that determines its results.
        replicate: the same without the seed, see `identity.replicate_hash`.
        seed: of the run.
        scale: of the run.
        experiment: that it is of, if any.
        again: whether it is trained anew where it is finished.
    """

    job: Job
    overrides: list[str]
    runs: Path
    name: str
    config_hash: str
    replicate: str
    seed: int
    scale: str
    experiment: str | None
    again: bool

    @property
    def folder(self) -> Path | None:
        """Its run directory, if it has one."""
        return newest(self.runs, self.name)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What came out of it, if it is finished."""
        folder = self.folder
        return None if folder is None else read_summary(folder / "summary.json")

    @property
    def label(self) -> str:
        """What it is, for people."""
        arm = [] if self.job.arm is None else [f"arm={self.job.arm}"]
        swept = [f"{key}={value}" for key, value in self.job.swept.items()]
        return " ".join([*arm, *swept, f"seed={self.seed}"])

    @property
    def outcome(self) -> str:
        """Its last metric, for people."""
        if (summary := self.summary) is None:
            return "not finished"
        name = summary["monitor"]
        value = summary["final"][name]
        return f"{name} {'not finite' if value is None else format(value, '.4g')}"


class Sweep:
    """A sweep that can be killed and started again.

    Args:
        jobs: all that it consists of.
        load: composes the config, with its hydra node, of a list of overrides.
        launch: runs such lists, the first of which has the number that it is given, and returns for
            each why it failed, or None.
    """

    def __init__(self, jobs: Sequence[Job], *, load: Load, launch: Launch) -> None:
        self.load, self._launch = load, launch
        self.jobs = list(jobs)
        self.planned: list[Planned] = []
        self.numbered: list[Planned] = []
        self.failures: dict[int, str] = {}

    def run(self) -> None:
        """Run what is not finished; say at the end what came out.

        Raises:
            UserError: a run has failed, or the config of one is none.
        """
        if len(self.jobs) >= MANY:
            say(f"looking for what there is of {len(self.jobs)} runs")
        sources = [source for job in self.jobs for source in job.starts_from.values()]
        first = [job for job in self.jobs if not job.starts_from]
        independent = [self.plan(job) for job in first]
        before = [self.plan(source) for source in sources]
        later = [job for job in self.jobs if job.starts_from]
        self.record(independent)
        self.launch([*independent, *before])
        dependent = [self.plan(job) for job in later]
        self.record(dependent)
        self.launch(dependent)
        self.tell([*independent, *dependent])

    def plan(self, job: Job) -> Planned:
        """What follows from the config of `job`. What it starts from must be finished by then."""
        overrides = list(job.overrides)
        for key, source in job.starts_from.items():
            start = self.plan(source)
            overrides.append(assignment(key, str(start.folder or start.runs / start.name)))
        composed = self.load(overrides)
        cfg = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        choices = composed.hydra.runtime.choices
        try:
            settings = run_settings(cfg)
        except UserError as error:
            raise UserError(f"{' '.join(job.overrides)}: {error}") from error
        require(settings.name is None, "name", settings.name, "null in a sweep")
        again = settings.resume == "never" and "resume=never" in overrides
        config = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(config, dict)
        return Planned(
            job=job,
            overrides=overrides if again else [*overrides, "resume=auto"],
            runs=Path(settings.runs),
            name=run_name(cfg, choices),
            config_hash=config_hash(cfg),
            replicate=replicate_hash(config),
            seed=settings.seed,
            scale=str(settings.scale),
            experiment=choices.get("experiment"),
            again=again,
        )

    def record(self, planned: Sequence[Planned]) -> None:
        """Write down which runs an experiment consists of, where its tables are made from."""
        for each in planned:
            if each.experiment is None:
                continue
            path = each.runs / "sweeps" / f"{each.experiment}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            row = {
                "experiment": each.experiment,
                "scale": each.scale,
                "arm": each.job.arm,
                "swept": each.job.swept,
                "seed": each.seed,
                "run": each.name,
                "config_hash": each.config_hash,
                "replicate": each.replicate,
                "overrides": each.overrides,
            }
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def launch(self, planned: Sequence[Planned]) -> None:
        """Run those that are not finished, each once."""
        unique = list({each.name: each for each in planned}.values())
        left = [each for each in unique if each.again or each.summary is None]
        if skipped := len(unique) - len(left):
            say(f"{skipped} of {len(unique)} runs finished before; resume=never trains again")
        if not left:
            return
        first = len(self.numbered)
        self.numbered += left
        failures = self._launch([each.overrides for each in left], first)
        for number, failure in enumerate(failures, first):
            if failure is not None:
                self.failures[number] = failure

    def tell(self, planned: Sequence[Planned]) -> None:
        """Say what came out of all, as a table; and which failed.

        Raises:
            UserError: some did.
        """
        finished = [each for each in planned if each.summary is not None]
        if finished:
            width = max(len(each.label) for each in planned)
            for each in planned:
                say(f"{each.label:<{width}}  {each.outcome:<20}  {each.name}")
        if self.failures:
            numbers = ", ".join(map(str, self.failures))
            raise UserError(f"{len(self.failures)} jobs of this sweep failed: {numbers}")
