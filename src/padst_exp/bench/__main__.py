"""Measure speed and memory beside dense: `python -m padst_exp.bench suite=... [key=value] ...`.

With `shape=3072x768 tokens=788 structure=nm` it says in a few lines whether one layer will pay.
"""

from __future__ import annotations

from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from padst_exp.cli import command_line


@command_line("bench")
def main(cfg: DictConfig) -> None:
    """Answer for one shape; or run one suite, write its table, figure and the README of all."""
    from padst_exp.bench import payoff, suites
    from padst_exp.messages import say

    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    if plain["shape"] is not None:
        given = HydraConfig.get().overrides.task
        payoff.answer(plain, " ".join(key for key in given if key.startswith("structure")), say)
        return
    for path in suites.run(plain, say):
        say(f"wrote {path}")


if __name__ == "__main__":
    main()
