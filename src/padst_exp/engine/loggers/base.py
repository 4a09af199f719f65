"""What all trackers share: a run goes on without them, and is one run there when it is resumed."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from padst_exp.atomic import replace_text
from padst_exp.errors import UserError, require_installed
from padst_exp.files import read_text
from padst_exp.messages import say

T = TypeVar("T")
Row = Mapping[str, Any]

LONGEST_ID = 80
NO_LABELS: Mapping[str, str] = {}
FILES = ("config.yaml", "metrics.jsonl", "summary.json", "curves.png")
"""What a tracker keeps of a finished run, besides its metrics."""


class NoLogger:
    """Logs nowhere else. Also what every logger is derived from."""

    def start(
        self,
        directory: Path,
        config: Mapping[str, object],
        *,
        rows: Iterable[Row] = (),
        labels: Mapping[str, str] = NO_LABELS,
    ) -> None:
        """Open the log of a run.

        Args:
            directory: of the run.
            config: the part of its configuration that determines results.
            rows: of `metrics.jsonl` up to the checkpoint that the run goes on from.
            labels: what it is trained for, as far as that is known: experiment, arm, scale.

        Raises:
            UserError: what it needs is not installed.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers at `step`."""

    def finish(self, summary: Mapping[str, object], exit_code: int = 0) -> None:
        """Close the log, with the results of the run if it got that far."""


class Tracker(NoLogger):
    """Logs to a service, whose failure costs one warning line and never the run.

    Attributes:
        service: its name.
        libraries: modules that it needs.
        extra: of this package, which brings them.
        replays: whether a resumed run tells it again what `metrics.jsonl` has up to there, so that
            it has all of that even where the run was killed before the service had taken it.
    """

    service: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    replays: ClassVar[bool] = True

    def __init__(self) -> None:
        self._run: Any = None
        self._directory = Path()
        # The last step that the service has of each metric. A run that was killed beyond its
        # checkpoint computes those steps again.
        self._last: dict[str, int] = {}

    def start(
        self,
        directory: Path,
        config: Mapping[str, object],
        *,
        rows: Iterable[Row] = (),
        labels: Mapping[str, str] = NO_LABELS,
    ) -> None:
        for library in self.libraries:
            require_installed(library, "logger", self.service, self.extra)
        self._directory = directory
        self._run = self._guarded(lambda: self._init(directory, config, labels))
        for row in rows if self.replays else ():
            self.log(row["step"], numbers(row))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        new = {key: value for key, value in values.items() if step > self._last.get(key, -1)}
        if self._run is not None and new:
            self._guarded(lambda: self._log(step, new))

    def finish(self, summary: Mapping[str, object], exit_code: int = 0) -> None:
        if self._run is not None and summary:
            self._guarded(lambda: self._summarize(summary))
        if self._run is not None:
            self._guarded(lambda: self._close(exit_code))
        self._run = None

    def files(self) -> list[Path]:
        """What is there of `FILES`."""
        return [path for name in FILES if (path := self._directory / name).is_file()]

    def _init(
        self, directory: Path, config: Mapping[str, object], labels: Mapping[str, str]
    ) -> Any:
        """What the service calls a run; None where nothing is to be logged."""
        raise NotImplementedError

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def _summarize(self, summary: Mapping[str, object]) -> None:
        """Log the results of a finished run, and its files."""
        raise NotImplementedError

    def _close(self, exit_code: int) -> None:
        raise NotImplementedError

    def _guarded(self, action: Callable[[], T]) -> T | None:
        # Whatever a service or its client comes up with must not cost hours of training.
        try:
            return action()
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            say(
                f"warning: {self.service} failed and is off now "
                f"({type(error).__name__}: {first_line}); metrics.jsonl goes on"
            )
            self._run = None
            return None


def run_id(directory: Path, file: str) -> str:
    """Eight hex digits by which a service knows the run in `directory`, kept there in `file`."""
    path = directory / file
    known = read_id(path)
    if not re.fullmatch("[0-9a-f]{8}", known):
        known = secrets.token_hex(4)
        replace_text(path, f"{known}\n")
    return known


def read_id(path: Path) -> str:
    """What stands in a file of one id; nothing where there is none."""
    try:
        return read_text("logger", path, "the name of a run", most=LONGEST_ID).strip()
    except UserError:
        return ""


def numbers(row: Row) -> dict[str, float]:
    """The numbers in a row of `metrics.jsonl`, by names that begin with its kind."""
    # What happens to several choices in one step must not overwrite each other.
    prefix = f"{row['kind']}/{row['choice']}/" if "choice" in row else f"{row['kind']}/"
    values = {key: value for key, value in row.items() if key not in ("kind", "step")}
    flat = flat_values(values, prefix)
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


def results(summary: Mapping[str, object]) -> dict[str, float]:
    """The numbers in a summary that runs are compared by."""
    kept = ("best", "final", "density_of_layers", "density_of_model", "parameters")
    flat = flat_values({key: summary[key] for key in kept if key in summary}, "summary/")
    return {key: value for key, value in flat.items() if isinstance(value, int | float)}


def flat_values(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested mappings as one, its keys joined by slashes."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_values(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
