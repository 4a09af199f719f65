"""Measure speed and memory beside dense: `python -m padst_exp.bench suite=... [key=value] ...`."""

from __future__ import annotations

from omegaconf import DictConfig

from padst_exp.bench.keys import Keys
from padst_exp.cli import command_line
from padst_exp.config import read_keys


@command_line("bench")
def main(cfg: DictConfig) -> None:
    """Run one suite; write its table, its figure and the README of all tables."""
    keys = read_keys(cfg, Keys)

    from padst_exp.bench import suites
    from padst_exp.messages import say

    for path in suites.run(keys, say):
        say(f"wrote {path}")


if __name__ == "__main__":
    main()
