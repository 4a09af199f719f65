"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from padst_exp.engine.loggers.base import Tracker, flat_values, run_id
from padst_exp.messages import say
from padst_exp.signals import held

# Where the environment says otherwise, it is the machine's word against the experiment's.
OVERRULED = {
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_RUN_GROUP": "group",
    "WANDB_JOB_TYPE": "job_type",
    "WANDB_TAGS": "tags",
    "WANDB_NAME": "name",
    "WANDB_RUN_ID": "id",
    "WANDB_RESUME": "resume",
}


class Wandb(Tracker):
    """Weights & Biases.

    A run directory is one run there, however often it is resumed. How and where it is logged may
    be set from outside (WANDB_MODE, WANDB_DISABLED, WANDB_DIR), what it is called may not. Its
    job type is the arm of the experiment.

    Args:
        project: name of the project.
        mode: "offline" needs no account and writes below the run directory, from where
            `wandb sync` uploads it; "online"; "disabled".
        entity: user or team; None: the account's own.
        group: of runs; None: the experiment, if there is one.
        tags: of the run, to which its scale is added.
    """

    service = "wandb"
    # It keeps the history of a run itself, and takes no step that it has passed.
    replays = False

    def __init__(
        self,
        *,
        project: str,
        mode: Literal["offline", "online", "disabled"],
        entity: str | None,
        group: str | None,
        tags: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.project = project
        self.mode = mode
        self.entity = entity
        self.group = group
        self.tags = tags

    def _init(
        self, directory: Path, config: Mapping[str, object], labels: Mapping[str, str]
    ) -> Any:
        mode = self._mode()
        if mode == "disabled":
            return None

        import wandb

        scale = (labels["scale"],) if "scale" in labels else ()
        own: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "group": self.group or labels.get("experiment"),
            "job_type": labels.get("arm"),
            "tags": (*self.tags, *scale),
            "name": directory.name,
            "id": run_id(directory, "wandb_id.txt"),
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
                config=dict(config) | dict(labels),
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

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def _summarize(self, summary: Mapping[str, object]) -> None:
        import wandb

        self._run.summary.update(flat_values(summary))
        tables = wandb.Artifact(f"results-{self._run.id}", type="results")
        for path in self.files():
            tables.add_file(str(path))
        self._run.log_artifact(tables)

    def _close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
