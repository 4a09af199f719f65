"""MLflow."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from padst_exp.atomic import replace_text
from padst_exp.engine.loggers.base import Tracker, flat_values, read_id, results
from padst_exp.errors import require

# Unless this machine says otherwise: an unreachable server is given up after some seconds, not
# minutes, and nothing is told to others.
ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_DISABLE_TELEMETRY": "true"}

LONGEST_VALUE, MOST_AT_ONCE = 6000, 100
"""Characters of a parameter, and parameters of one request, that every server takes."""


class Mlflow(Tracker):
    """MLflow, with a server or a database in a file.

    Experiments are called alike there. What determines results are parameters, arm and scale are
    tags, the files of a finished run are artifacts. A run directory is one run, however often it
    is resumed: steps that a killed run had logged beyond its checkpoint keep their first values.

    Args:
        uri: of the server or the database, without a password (MLFLOW_TRACKING_USERNAME,
            MLFLOW_TRACKING_PASSWORD and MLFLOW_TRACKING_TOKEN have them); None: as
            MLFLOW_TRACKING_URI says, else mlflow.db in the folder of run directories.
        project: name of the MLflow experiment for runs that are for no experiment of ours.

    Raises:
        UserError: the uri has a password in it, which would end up in files.
    """

    service = "mlflow"
    libraries = ("mlflow", "sqlalchemy", "alembic")
    extra = "mlflow"

    def __init__(self, *, uri: str | None, project: str) -> None:
        super().__init__()
        parts = urlsplit(uri or "")
        wanted = "an address without user and password (MLFLOW_TRACKING_USERNAME has the user)"
        require("@" not in parts.netloc, "logger.uri", f"one of {parts.hostname}", wanted)
        self.uri, self.project = uri, project

    def _init(
        self, directory: Path, config: Mapping[str, object], labels: Mapping[str, str]
    ) -> Any:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        runs = directory.resolve().parent
        local = self.uri is None and not os.environ.get("MLFLOW_TRACKING_URI")
        uri = f"sqlite:///{runs / 'mlflow.db'}" if local else self.uri
        # Several runs of a sweep would make the tables of one database at the same time.
        first: AbstractContextManager[object] = nullcontext()
        if local:
            first = FileLock(runs / ".mlflow.lock")
        with first:
            client = MlflowClient(tracking_uri=uri)
            experiment = _experiment(
                client,
                labels.get("experiment", self.project),
                (runs / "mlflow_artifacts").as_uri() if local else None,
            )
        file = directory / "mlflow_id.txt"
        self._id = _known(client, read_id(file))
        if self._id:
            client.update_run(self._id, status="RUNNING")
            self._last = {
                name: max(metric.step for metric in client.get_metric_history(self._id, name))
                for name in client.get_run(self._id).data.metrics
            }
        else:
            self._id = client.create_run(
                experiment, run_name=directory.name, tags=dict(labels)
            ).info.run_id
            replace_text(file, f"{self._id}\n")
            _log_parameters(client, self._id, config)
        return client

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in values.items()]
        for start in range(0, len(metrics), MOST_AT_ONCE):
            self._run.log_batch(self._id, metrics=metrics[start : start + MOST_AT_ONCE])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        super().log(step, {_name(key): value for key, value in values.items()})

    def _summarize(self, summary: Mapping[str, object]) -> None:
        steps = summary.get("steps")
        named = {_name(key): value for key, value in results(summary).items()}
        self._log(steps if isinstance(steps, int) else 0, named)
        for path in self.files():
            self._run.log_artifact(self._id, str(path))

    def _close(self, exit_code: int) -> None:
        # As a shell has it, above 128 is a signal.
        ended = "KILLED" if exit_code > 128 else "FAILED"
        self._run.set_terminated(self._id, ended if exit_code else "FINISHED")


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    """The id of the MLflow experiment of this name, made if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another run was faster
            if found is None:
                raise
    return str(found.experiment_id)


def _known(client: Any, run: str) -> str:
    """The id of a run, if this server has it."""
    from mlflow.exceptions import MlflowException

    if not re.fullmatch("[0-9a-f]{32}", run):
        return ""
    try:
        return str(client.get_run(run).info.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return ""


def _log_parameters(client: Any, run: str, config: Mapping[str, object]) -> None:
    from mlflow.entities import Param

    values = {
        _name(key): value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in flat_values(config).items()
    }
    parameters = [Param(key, value[:LONGEST_VALUE]) for key, value in values.items()]
    for start in range(0, len(parameters), MOST_AT_ONCE):
        client.log_batch(run, params=parameters[start : start + MOST_AT_ONCE])


def _name(key: str) -> str:
    """A name as MLflow takes it."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:250]
