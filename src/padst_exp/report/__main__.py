"""Tables and a page from all runs: `python -m padst_exp.report [key=value] ...`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from padst_exp.cli import command_line, told_in_one_line
from padst_exp.config import read_keys
from padst_exp.overrides import check_overrides

KERNELS = "results/kernels"


@dataclass(frozen=True, kw_only=True)
class ReportSchema:
    """The keys of conf/report.yaml.

    Args:
        runs: folders of run directories.
        experiments: to report; None for all.
        baseline: arm that all others are paired with; None for the control of each.
        out: folder to write.
        kernels: folder of measured speeds.
        published: file of numbers that papers print.
    """

    runs: str | tuple[str, ...]
    experiments: str | tuple[str, ...] | None
    baseline: str | None
    out: str
    kernels: str
    published: str


def main() -> None:
    """Report, or plan where that is the first argument."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["plan"] and not {"--help", "-h"} & set(arguments):
        with told_in_one_line():
            plan(arguments[1:])
    else:
        report()


def plan(overrides: list[str]) -> None:
    """Say what the runs of a command line would take."""
    from padst_exp.messages import say
    from padst_exp.report.plan import plan

    check_overrides(overrides)
    for line in plan(overrides, Path(KERNELS)):
        say(line)


@command_line("report")
def report(cfg: DictConfig) -> None:
    """Write tables and the page, and say where."""
    keys = read_keys(cfg, ReportSchema)

    from padst_exp.messages import say
    from padst_exp.report import write

    folders = [keys.runs] if isinstance(keys.runs, str) else keys.runs
    experiments = [keys.experiments] if isinstance(keys.experiments, str) else keys.experiments
    for line in write.report(
        [Path(folder) for folder in folders],
        experiments=experiments,
        baseline=keys.baseline,
        out=Path(keys.out),
        kernels=Path(keys.kernels),
        published=Path(keys.published),
    ):
        say(line)


if __name__ == "__main__":
    main()
