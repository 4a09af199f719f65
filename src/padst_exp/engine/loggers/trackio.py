"""Trackio."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from padst_exp.engine.loggers.base import Tracker, results, run_id


class Trackio(Tracker):
    """Trackio: a database on this machine, or a Space or server as its environment says.

    TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL say where; `trackio show` shows it. A run
    directory is one run there, however often it is resumed: steps that a killed run had logged
    beyond its checkpoint keep their first values.

    Args:
        project: name of the project.
        group: of runs; None: the experiment and the arm, if there is one.
    """

    service = "trackio"
    libraries = ("trackio",)
    extra = "trackio"

    def __init__(self, *, project: str, group: str | None) -> None:
        super().__init__()
        self.project, self.group = project, group

    def _init(
        self, directory: Path, config: Mapping[str, object], labels: Mapping[str, str]
    ) -> Any:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        # Runs are continued by name, and two folders of runs may have the same.
        name = f"{directory.name}-{run_id(directory, 'trackio_id.txt')}"
        group = [labels[key] for key in ("experiment", "arm") if key in labels]
        with redirect_stdout(io.StringIO()):
            run = trackio.init(
                self.project,
                name=name,
                group=self.group or "/".join(group) or None,
                config={**config, **labels},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        # Of a Space or a server it keeps no copy: nothing is known then, and nothing told again.
        for row in SQLiteStorage.get_logs(self.project, run=run.name, run_id=run.id):
            for key in row:
                self._last[key] = max(self._last.get(key, -1), row["step"])
        return run

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def _summarize(self, summary: Mapping[str, object]) -> None:
        import trackio

        steps = summary.get("steps")
        self._log(steps if isinstance(steps, int) else 0, results(summary))
        tables = trackio.Artifact(f"results-{self._run.name}", type="results")
        for path in self.files():
            tables.add_file(str(path))
        self._run.log_artifact(tables)

    def _close(self, exit_code: int) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()
