"""Measure speed and memory beside dense: `python -m padst_exp.bench suite=... [key=value] ...`."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from padst_exp.cli import command_line


@command_line("bench")
def main(cfg: DictConfig) -> None:
    """Run one suite; write its table, its figure and the README of all tables."""
    from padst_exp.bench import suites
    from padst_exp.messages import say

    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    for path in suites.run(plain, say):
        say(f"wrote {path}")


if __name__ == "__main__":
    main()
