"""TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from padst_exp.engine.loggers.base import Tracker, flat_values, results

FOLDER = "tensorboard"


class TensorBoard(Tracker):
    """TensorBoard: event files in the run directory, for `tensorboard --logdir runs`.

    What determines results is there as text and, once the run is finished, as hyperparameters,
    the experiment and its arm among them. A resumed run begins a file that takes the place of all
    earlier ones.
    """

    service = "tensorboard"
    libraries = ("tensorboard",)
    extra = "tensorboard"

    def __init__(self) -> None:
        super().__init__()
        self._config: dict[str, object] = {}

    def _init(
        self, directory: Path, config: Mapping[str, object], labels: Mapping[str, str]
    ) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        self._config = flat_values({**config, **labels})
        folder = directory / FOLDER
        # Readers then forget what they had from this step on.
        writer = SummaryWriter(str(folder), purge_step=0 if folder.is_dir() else None)
        lines = json.dumps({**config, **labels}, indent=2, default=str).splitlines()
        writer.add_text("config", "\n".join(f"    {line}" for line in lines), 0)
        return writer

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._run.add_scalar(name, value, step)
        self._run.flush()  # or a kill takes two minutes of them along

    def _summarize(self, summary: Mapping[str, object]) -> None:
        keys = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in self._config.items()
        }
        # Beside the scalars, in no run of its own.
        self._run.add_hparams(keys, results(summary), run_name=".")

    def _close(self, exit_code: int) -> None:
        self._run.close()
