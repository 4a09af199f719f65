"""The folder of one run: what was asked, where it ran, what was measured, what came out."""

from __future__ import annotations

import glob
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import yaml

from padst_exp.atomic import own_descriptor, replace_text
from padst_exp.engine.checkpoint import Checkpoints, require_same_config
from padst_exp.engine.distributed import World

# Fields of metrics.jsonl and summary.json that tell of time or of the machine. All others are
# equal, bit by bit, in a straight run and in one that was killed and resumed.
TIME_FIELDS = frozenset({"seconds", "samples_per_second", "tokens_per_second", "timing"})

_PACKAGES = ("torch", "triton", "timm", "transformers", "datasets", "hydra-core", "numpy", "scipy")


class RunDirectory:
    """The folder of one run. Nothing that it finds there is ever deleted.

    Contents: `config.yaml`, `overrides.yaml`, `env.json` (and `env-resume-<n>.json`),
    `metrics.jsonl`, `checkpoints/`, and at the end `summary.json`, `curves.png`, `topology.png`.

    Attributes:
        path: the folder.
        config: the part of the configuration that determines results, as plain containers.
        config_text: the whole of it, as YAML.
        checkpoints: of this run.
        finished: whether the run has its summary already.
    """

    def __init__(self, path: Path, *, config: Mapping[str, object], config_text: str) -> None:
        self.path = path
        self.config = config
        self.config_text = config_text
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._metrics: TextIO | None = None

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        world: World,
        *,
        resume: Literal["never", "auto"],
        config: Mapping[str, object],
        config_text: str,
        overrides: list[str],
    ) -> RunDirectory:
        """Make the folder of a new run, or find that of the run to continue. A collective.

        Args:
            root: folder of all runs.
            name: of this run; a new folder gets a suffix -2, -3, ... where that exists.
            world: rank 0 decides and writes, the others learn the folder.
            resume: "auto" continues the newest folder of this name if there is one.
            config: nested plain containers, the part that determines results.
            config_text: the whole configuration as YAML, interpolations resolved.
            overrides: of the command line.

        Raises:
            UserError: the folder to continue was made with another configuration.
        """
        path = None
        if world.main:
            device = str(world.device)
            path = _newest(root, name) if resume == "auto" else None
            if path is None:
                path = _create(root, name, config_text, overrides, device)
            else:
                _reopen(path, config, device)
        path = world.from_main(path)
        assert path is not None
        return cls(path, config=config, config_text=config_text)

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    def summary(self) -> dict[str, Any]:
        """Return the summary of a finished run."""
        return json.loads((self.path / "summary.json").read_text())

    def open_metrics(self, step: int) -> list[dict[str, Any]]:
        """Open `metrics.jsonl` for rows after `step`, dropping those that are there already.

        They stem from steps after the checkpoint that a killed run is resumed from; they
        will be computed, and written, again.

        Returns:
            The rows that stay.
        """
        path = self.path / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        replace_text(path, "".join(_line(row) for row in kept))
        self._metrics = open(path, "a", buffering=1, opener=own_descriptor)  # noqa: SIM115
        return kept

    def append(self, row: Mapping[str, object]) -> None:
        """Append one row to `metrics.jsonl`, visible to readers at once."""
        assert self._metrics is not None, "open_metrics comes first"
        self._metrics.write(_line(row))

    def sync_metrics(self) -> None:
        """Bring the rows to disk, so that no checkpoint is ever ahead of them."""
        assert self._metrics is not None, "open_metrics comes first"
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def finish(self, summary: Mapping[str, object]) -> None:
        """Write `summary.json`, which marks the run as finished."""
        _write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        """Close `metrics.jsonl`."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def _create(root: Path, name: str, config_text: str, overrides: Iterable[str], device: str) -> Path:
    path, number = root / name, 1
    while True:
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            path = root / f"{name}-{number}"
    (path / "checkpoints").mkdir()
    # A JSON string is a YAML string, whatever it holds.
    lines = [f"- {json.dumps(override, ensure_ascii=False)}\n" for override in overrides]
    replace_text(path / "overrides.yaml", "".join(lines) or "[]\n")
    _write_json(path / "env.json", environment(device))
    # Last, as the mark of a folder that is complete enough to be continued.
    replace_text(path / "config.yaml", config_text)
    return path


def _reopen(path: Path, config: Mapping[str, object], device: str) -> None:
    stored = yaml.safe_load((path / "config.yaml").read_text())
    require_same_config({key: stored[key] for key in config if key in stored}, config, path)
    if not (path / "summary.json").exists():
        number = len(list(path.glob("env-resume-*.json"))) + 1
        _write_json(path / f"env-resume-{number}.json", environment(device))


def _newest(root: Path, name: str) -> Path | None:
    """Return the folder called `name`, or `name` with the highest suffix, that is complete."""
    found = {1: root / name}
    for path in root.glob(f"{glob.escape(name)}-*"):
        suffix = path.name.removeprefix(f"{name}-")
        if suffix.isdigit():
            found[int(suffix)] = path
    complete = [number for number in sorted(found) if (found[number] / "config.yaml").exists()]
    return found[complete[-1]] if complete else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`; a line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def environment(device: str) -> dict[str, object]:
    """Return what is needed to tell later where, with what and by which code a run was made."""
    source = Path(__file__).parent
    commit = _git(source, "rev-parse", "HEAD")
    # Results are what measuring changes.
    code = ":(top)", ":(top,exclude)results"
    status = _git(source, "status", "--porcelain", "--untracked-files=no", "--", *code)
    return {
        "git_commit": commit,
        "git_dirty": None if status is None else bool(status),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": [sys.executable, *sys.argv],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git says, or None outside a checkout (or without git)."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _line(row: Mapping[str, object]) -> str:
    return json.dumps(row) + "\n"


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    replace_text(path, json.dumps(value, indent=2) + "\n")
