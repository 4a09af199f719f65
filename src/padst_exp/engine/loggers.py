"""Where metrics go besides `metrics.jsonl`: targets of conf/logger/*.yaml."""

import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from padst_exp.atomic import replace_text
from padst_exp.errors import UserError
from padst_exp.files import read_text
from padst_exp.messages import say
from padst_exp.signals import held

T = TypeVar("T")
LONGEST_ID = 80


class NoLogger:
    """Logs nowhere else. Also what every logger is derived from."""

    def start(self, directory: Path, config: Mapping[str, object]) -> None:
        """Open the log of the run in `directory`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers at `step`."""

    def finish(self, summary: Mapping[str, object], exit_code: int = 0) -> None:
        """Close the log, with the results of the run if it got that far."""


# Where the environment says otherwise, it is the machine's word against the experiment's.
OVERRULED = {
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_RUN_GROUP": "group",
    "WANDB_TAGS": "tags",
    "WANDB_NAME": "name",
    "WANDB_RUN_ID": "id",
    "WANDB_RESUME": "resume",
}


class Wandb(NoLogger):
    """Weights & Biases. A failure of it costs one warning line, never the run.

    A run directory is one run there, however often it is resumed. How and where it is logged may
    be set from outside (WANDB_MODE, WANDB_DISABLED, WANDB_DIR), what it is called may not.

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
        mode = self._mode()
        if mode == "disabled":
            return None

        import wandb

        own: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "group": self.group,
            "tags": self.tags,
            "name": directory.name,
            "id": run_id(directory),
            "resume": "allow" if mode == "online" else None,
        }
        for name, key in OVERRULED.items():
            if os.environ.get(name):
                say(f"{name} is set, but logger.{key} of this run is {own[key]}")
        # Its service ends when this process tells it to, not with every signal to the group.
        with held():
            return wandb.init(
                **own,
                mode=mode,
                dir=os.environ.get("WANDB_DIR") or directory,
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
            )

    def _mode(self) -> Any:
        """As configured, unless the environment of this machine says something else."""
        variable, mode = "WANDB_MODE", os.environ.get("WANDB_MODE") or self.mode
        if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "y", "t", "on"):
            variable, mode = "WANDB_DISABLED", "disabled"
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
        if mode not in ("offline", "online", "disabled"):
            mode = self.mode
        if mode != self.mode:
            say(f"wandb is {mode}, as {variable} in the environment has it, not {self.mode}")
        return mode

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


def run_id(directory: Path) -> str:
    """The name under which the service knows the run in `directory`, kept there."""
    path = directory / "wandb_id.txt"
    try:
        known = read_text("logger", path, "the name of a run", most=LONGEST_ID).strip()
    except UserError:
        known = ""
    if not re.fullmatch("[0-9a-f]{8}", known):
        known = secrets.token_hex(4)
        replace_text(path, f"{known}\n")
    return known


def flat_values(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one, its keys joined by slashes."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_values(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
