"""Runs as they lie on disk, and the experiments that name them. All of it may be anybody's data."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from padst_exp.engine.records import OUTCOMES, Rows, read_metrics
from padst_exp.errors import UserError
from padst_exp.files import (
    TRAINING_CONFIG,
    one_line,
    read_mapping,
    read_text,
    read_yaml,
    reading,
    reason,
)
from padst_exp.identity import name_hash
from padst_exp.report.statistics import is_figure_of

State = Literal["finished", "unfinished", "not begun", "damaged", "repeat"]

MANIFESTS = "sweeps"
DEEPEST = 3
"""Folders between one of runs and a run in it."""
MOST_BYTES = 1 << 26
_MARKS = frozenset({"config.yaml", "summary.json", "metrics.jsonl", "checkpoints"})
"""What tells a run from a folder of runs, even where a file of it is damaged or gone."""
SCALES = ("demo", "small", "paper")
NO_EXPERIMENT = "single_runs"
# What becomes the name of a file, and of an anchor of the page.
_HASH = re.compile(r"[0-9a-f]{8}")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,80}", re.ASCII)


@dataclass(frozen=True)
class Place:
    """Where a run stands in an experiment.

    Args:
        experiment: its name, fit for a file name.
        scale: "demo", "small", "paper", or "unknown".
        arm: what is compared; of a run outside of a sweep a name made of its choices.
        swept: what else differs between runs, beside the seed: values by key.
        seed: the replicate.
        overrides: a command line of this run.
        hash: of its config, as the sweep had it; empty outside of sweeps.
    """

    experiment: str
    scale: str
    arm: str
    swept: Mapping[str, object]
    seed: int
    overrides: tuple[str, ...]
    hash: str = ""


@dataclass(frozen=True)
class Run:
    """One run directory, whatever is in it.

    Args:
        path: the folder, or where it was to be.
        state: "finished" where a sound `summary.json` is there.
        why: what is wrong or missing, in a line; empty for a finished run.
        config: of `config.yaml`, plain; empty where it cannot be read.
        summary: of `summary.json`, empty unless finished.
        environment: of `env.json`, empty where it cannot be read.
        overrides: of the command line.
    """

    path: Path
    state: State
    why: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        """Of what determines its results, as in its name; empty without a config."""
        return name_hash(self.config) if self.config else ""

    def outcomes(self) -> NDArray[np.float64] | None:
        """Those of `Task.outcomes`, `[N, 2]`; None where there are none that make its figure."""
        path = self.path / OUTCOMES
        try:
            with reading("run", path, "outcomes that training wrote"):
                if path.stat().st_size > MOST_BYTES:
                    return None
                found = np.load(path, allow_pickle=False)
                sound = found.dtype == np.float32 and found.ndim == 2 and found.shape[1] == 2
                if not sound or not np.isfinite(found).all():
                    return None
                outcomes = found.astype(np.float64)
        except UserError:
            return None
        metric = str(self.summary.get("monitor"))
        stated = number(self.summary.get("final", {}).get(metric))
        return outcomes if is_figure_of(outcomes, metric, stated) else None

    def metrics(self) -> Rows:
        """The rows of its `metrics.jsonl`, none where it cannot be read."""
        try:
            return read_metrics(self.path / "metrics.jsonl")
        except UserError:
            return []


@dataclass(frozen=True)
class Found:
    """All that is in some folders of runs.

    Args:
        placed: every run in every experiment that names it, with its place there.
        problems: what could not be read and belongs to no run, in lines.
    """

    placed: tuple[tuple[Place, Run], ...]
    problems: tuple[str, ...]


def find(folders: Iterable[Path]) -> Found:
    """Read all runs in `folders`; nothing in them is trusted, and nothing is left out in silence.

    A run belongs to every experiment whose manifest, `<folder>/sweeps/<experiment>.jsonl`, names
    it. One that none does is placed by its own config and command line, unless its experiment has
    a manifest: then it is there for others to start from, and has no row of its own.

    Raises:
        UserError: a folder is none.
    """
    placed: list[tuple[Place, Run]] = []
    problems: list[str] = []
    for folder in folders:
        if not folder.exists():
            problems.append(f"{folder}: there is no such folder")
            continue
        if not folder.is_dir():
            raise UserError(f"runs: expected folders of runs, got {folder} (it is a file)")
        runs = {path: read(path) for path in _run_directories(folder)}
        named: set[Path] = set()
        swept: set[str] = set()
        for manifest in sorted((folder / MANIFESTS).glob("*.jsonl")):
            entries, bad = _entries(manifest)
            problems += bad
            for place, name in entries:
                path = _newest(folder, name, runs)
                run = runs.get(path) or Run(path, "not begun", "there is no such folder")
                named.add(path)
                swept.add(place.experiment)
                placed.append((place, _checked(place, run)))
        for path, run in runs.items():
            if path in named:
                continue
            if (place := _own_place(run)).experiment in swept:
                problems.append(f"{path}: in no sweep, others may start from it")
            else:
                placed.append((place, run))
    return Found(tuple(_without_repeats(placed)), tuple(problems))


def read(path: Path) -> Run:
    """One run directory."""
    try:
        config = _config(path / "config.yaml")
    except UserError as error:
        return Run(path, "damaged", one_line(str(error)))
    environment = _quietly(path / "env.json")
    overrides = _overrides(path / "overrides.yaml")
    common: dict[str, Any] = {
        "config": config, "environment": environment, "overrides": overrides
    }  # fmt: skip
    if not os.path.lexists(path / "summary.json"):
        step = max((row["step"] for row in Run(path, "unfinished").metrics()), default=0)
        return Run(path, "unfinished", f"no summary yet, its last row is of step {step}", **common)
    try:
        summary = _json(path / "summary.json")
        value = summary["final"][summary["monitor"]]
        if value is not None and not _is_number(value):
            raise UserError(f"its {one_line(str(summary['monitor']))} is no number")
    except (UserError, KeyError, TypeError) as error:
        why = reason(error) if isinstance(error, KeyError) else one_line(str(error))
        return Run(path, "damaged", f"summary.json: {why}", **common)
    return Run(path, "finished", "", summary=summary, **common)


def number(value: object) -> float:
    """A number as it stands in JSON, NaN for everything else."""
    return float(value) if _is_number(value) else math.nan


def _is_number(value: object) -> TypeGuard[int | float]:
    # Integers of any length are JSON, too.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300


def _config(path: Path) -> dict[str, Any]:
    """A training config as plain containers; nothing in it is resolved, let alone called."""
    config = read_mapping("run", path, TRAINING_CONFIG)
    with reading("run", path, TRAINING_CONFIG):
        if type(config.get("seed")) is not int:
            raise ValueError("it has no seed")
        json.dumps(config)  # dates, sets and the like are in no config of ours
    return config


def _json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file."""
    text = read_text("run", path, "one that training wrote", most=MOST_BYTES)
    with reading("run", path, "one that training wrote"):
        content = json.loads(text)
        if not isinstance(content, dict):
            raise TypeError("it is no mapping")
    return content


def _quietly(path: Path) -> dict[str, Any]:
    try:
        return _json(path)
    except UserError:
        return {}


def _overrides(path: Path) -> tuple[str, ...]:
    try:
        content = read_yaml("run", path, "a list")
    except UserError:
        return ()
    return tuple(map(str, content)) if isinstance(content, list) else ()


def _run_directories(folder: Path) -> Iterator[Path]:
    """Folders with a config, at most `DEEPEST` below; links to folders are not followed."""
    for where, inner, files in os.walk(folder):
        path = Path(where)
        if path != folder and not _MARKS.isdisjoint((*files, *inner)):
            yield path
            inner.clear()
        depth = len(path.relative_to(folder).parts)
        inner[:] = sorted(name for name in inner if name[0] != ".") if depth < DEEPEST else []


def _entries(manifest: Path) -> tuple[list[tuple[Place, str]], list[str]]:
    """Places with the names of their runs, the last line of each (run, arm), and what is bad."""
    entries: dict[tuple[str, str], tuple[Place, str]] = {}
    try:
        text = read_text("runs", manifest, "the runs of a sweep", most=MOST_BYTES)
    except UserError as error:
        return [], [one_line(str(error))]
    bad = 0
    for line in filter(str.strip, text.splitlines()):
        entry = _entry(line, manifest.stem)
        if entry is None:
            bad += 1
        else:
            entries[entry[1], entry[0].arm] = entry
    # A line that is being written is cut short, and is no run yet.
    problems = [f"{manifest}: {bad} lines are no runs of a sweep"] if bad else []
    return list(entries.values()), problems


def _entry(line: str, experiment: str) -> tuple[Place, str] | None:
    try:
        content = json.loads(line)
        run, seed = content["run"], content["seed"]
        swept, arm = content.get("swept") or {}, content.get("arm")
        overrides = content.get("overrides") or []
        scale, digits = content.get("scale"), content.get("config_hash")
        sound = isinstance(run, str) and type(seed) is int and isinstance(overrides, list)
        # Names of folders, not paths to anywhere.
        if not sound or not isinstance(swept, dict) or Path(run).name != run:
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    overrides = tuple(str(override) for override in overrides)
    swept = {str(key): value for key, value in swept.items()}
    name = "" if arm is None else str(arm)
    known = digits if isinstance(digits, str) and _HASH.fullmatch(digits) else ""
    return Place(_safe(experiment), _scale(scale), name, swept, seed, overrides, known), run


def _newest(folder: Path, name: str, runs: Mapping[Path, Run]) -> Path:
    """The folder of a run: of those with a suffix the newest finished one, else the newest."""
    numbered = {1: folder / name} if folder / name in runs else {}
    for path in runs:
        suffix = path.name.removeprefix(f"{name}-")
        if path.parent == folder and path.name != suffix and suffix.isdecimal():
            numbered[int(suffix)] = path
    finished = {number: p for number, p in numbered.items() if runs[p].state == "finished"}
    choice = finished or numbered
    return choice[max(choice)] if choice else folder / name


def _checked(place: Place, run: Run) -> Run:
    """A run of a sweep, unless it is another than the sweep has started."""
    if run.config and run.config["seed"] != place.seed:
        why = f"its seed is {run.config['seed']}, the sweep started one with seed {place.seed}"
        return Run(run.path, "damaged", why, config=run.config)
    return run


def _own_place(run: Run) -> Place:
    """The place of a run that no sweep names."""
    given = dict(override.partition("=")[::2] for override in run.overrides)
    experiment = given.get("experiment", NO_EXPERIMENT)
    arm, seed = run.config.get("arm"), run.config.get("seed", 0)
    name = "" if arm is None else str(arm)
    scale = _scale(run.config.get("scale"))
    return Place(_safe(experiment), scale, name, {}, seed, run.overrides)


def _without_repeats(placed: Iterable[tuple[Place, Run]]) -> Iterator[tuple[Place, Run]]:
    """Equal runs are one replicate, however often they lie there."""
    seen: dict[tuple[str, str, str], Path] = {}
    for place, run in placed:
        key = (place.experiment, place.arm, run.hash)
        if run.state != "finished":
            yield place, run
        elif key in seen:
            why = f"the same as {seen[key].name}"
            yield place, Run(run.path, "repeat", why, config=run.config, overrides=run.overrides)
        else:
            seen[key] = run.path
            yield place, run


def _safe(name: str) -> str:
    return name if _NAME.fullmatch(name) else "other"


def _scale(scale: object) -> str:
    return scale if isinstance(scale, str) and scale in SCALES else "unknown"
