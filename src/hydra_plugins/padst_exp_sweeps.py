"""The sweeper and the launcher of `padst_exp`: Hydra takes plugins from this namespace alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ArmsSweeper(Sweeper):
    """All combinations of the arms of an experiment with what else is listed; finished runs stay.

    Args:
        params, arms: as in `padst_exp.sweeps.expand`.
        contrasts: pairs of arms; the report compares them, and nothing here does.
    """

    def __init__(
        self,
        params: Mapping[str, Any] | None,
        arms: Mapping[str, Mapping[str, Any]],
        contrasts: Sequence[Sequence[str]],
    ) -> None:
        self.params, self.arms, self.contrasts = params, arms, contrasts

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from padst_exp.sweeps.jobs import jobs_of
        from padst_exp.sweeps.sweep import Sweep

        assert self.hydra_context is not None and self.config is not None
        loader, config, launcher = self.hydra_context.config_loader, self.config, self.launcher
        assert launcher is not None

        def launch(overrides: list[list[str]], first: int) -> list[str | None]:
            returns = launcher.launch(overrides, initial_job_idx=first)
            return [_failure(each) for each in returns]

        def load(overrides: list[str]) -> DictConfig:
            return loader.load_sweep_config(config, overrides)

        parser = OverridesParser.create(config_loader=loader)
        sweep = Sweep(jobs_of(arguments, load, parser), load=load, launch=launch)
        if isinstance(launcher, ProcessLauncher):
            launcher.sweep = sweep
        sweep.run()


class ProcessLauncher(Launcher):
    """Each run is a process of its own, as many at a time as there are GPUs, or cores.

    Args:
        n_jobs: how many at a time; None: as above.
    """

    sweep: Any = None

    def __init__(self, n_jobs: int | None) -> None:
        self.n_jobs = n_jobs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from padst_exp.sweeps.local import Pool, command, visible_gpus

        listed = set(self.config.hydra.overrides.task)
        own = [argument for argument in sys.argv[1:] if argument not in listed]
        pool = Pool(
            size=self.n_jobs,
            gpus=visible_gpus(self.config.device),
            logs=Path(self.config.hydra.sweep.dir),
            label=lambda number: str(self.sweep.numbered[number].label),
            outcome=lambda number: str(self.sweep.numbered[number].outcome),
        )
        commands = [command(own, overrides) for overrides in job_overrides]
        returns = []
        for overrides, failure in zip(
            job_overrides, pool.run(commands, initial_job_idx), strict=True
        ):
            result = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
            result.return_value = failure
            returns.append(result)
        return returns


def _failure(result: JobReturn) -> str | None:
    """Why a job failed; None where it did not, or has said so itself."""
    value = result.return_value  # raises what the job raised
    return value if isinstance(value, str) else None
