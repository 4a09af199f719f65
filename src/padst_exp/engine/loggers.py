"""Where metrics go besides `metrics.jsonl`: targets of conf/logger/*.yaml."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from padst_exp.messages import say

T = TypeVar("T")


class NoLogger:
    """Logs nowhere else. Also what every logger is derived from."""

    def start(self, directory: Path, config: Mapping[str, object]) -> None:
        """Open the log of the run in `directory`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers at `step`."""

    def finish(self, summary: Mapping[str, object], exit_code: int = 0) -> None:
        """Close the log, with the results of the run if it got that far."""


class Wandb(NoLogger):
    """Weights & Biases. A failure of it costs one warning line, never the run.

    Args:
        project: name of the project.
        mode: "offline" needs no account and writes below the run directory, from where
            `wandb sync` uploads it; "online"; "disabled".
        entity: user or team; None: the account's own.
        group: of runs.
        tags: of the run.
    """

    def __init__(
        self,
        *,
        project: str,
        mode: Literal["offline", "online", "disabled"],
        entity: str | None,
        group: str | None,
        tags: tuple[str, ...],
    ) -> None:
        self.project = project
        self.mode = mode
        self.entity = entity
        self.group = group
        self.tags = tags
        self._run: Any = None

    def start(self, directory: Path, config: Mapping[str, object]) -> None:
        self._run = self._guarded(lambda: self._init(directory, config))

    def _init(self, directory: Path, config: Mapping[str, object]) -> Any:
        import wandb

        return wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            name=directory.name,
            # The tests of this package, and clusters, switch it off from outside.
            mode="disabled" if os.environ.get("WANDB_MODE") == "disabled" else self.mode,
            dir=directory,
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._run is not None:
            self._guarded(lambda: self._run.log(dict(values), step=step))

    def finish(self, summary: Mapping[str, object], exit_code: int = 0) -> None:
        if self._run is not None:
            self._guarded(lambda: self._run.summary.update(flat_values(summary)))
        if self._run is not None:
            self._guarded(lambda: self._run.finish(exit_code=exit_code))
        self._run = None

    def _guarded(self, action: Callable[[], T]) -> T | None:
        # Whatever a service or its client comes up with must not cost hours of training.
        try:
            return action()
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            say(
                f"warning: wandb failed and is off now ({type(error).__name__}: {first_line}); "
                "metrics.jsonl goes on"
            )
            self._run = None
            return None


def flat_values(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one, its keys joined by slashes."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_values(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
