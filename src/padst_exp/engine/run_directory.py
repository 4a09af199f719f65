"""The folder of one run: what was asked, where it ran, what was measured, what came out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch
from torch import Tensor

from padst_exp.atomic import (
    own_descriptor,
    remove_leftovers,
    replace_text,
    replacing,
    sync,
    temporary_name,
)
from padst_exp.engine.checkpoint import Checkpoints, require_same_config
from padst_exp.engine.distributed import World
from padst_exp.engine.environment import package_version
from padst_exp.engine.folders import is_run, newest
from padst_exp.engine.lock import Lock
from padst_exp.engine.records import OUTCOMES, read_metrics, read_summary, to_json
from padst_exp.errors import UserError
from padst_exp.files import TRAINING_CONFIG, read_mapping
from padst_exp.identity import differences, results_part
from padst_exp.messages import say

# Fields of metrics.jsonl and summary.json that tell of time or of the machine. All others are
# equal, bit by bit, in a straight run and in one that was killed and resumed.
TIME_FIELDS = frozenset(
    {"seconds", "samples_per_second", "tokens_per_second", "input_wait_share", "timing"}
)

COMPARED, FEW = 20, 3
"""Runs that a new one is compared with; keys in which one may differ to be worth a word."""

_PACKAGES = ("torch", "triton", "timm", "transformers", "datasets", "hydra-core", "numpy", "scipy")


class RunDirectory:
    """The folder of one run, held by one process. Nothing that is not ours is ever deleted there.

    Contents: `config.yaml`, `overrides.yaml`, `env.json` (and `env-resume-<n>.json`),
    `metrics.jsonl`, `checkpoints/`, and at the end `outcomes.npy` (of every validation sample),
    `summary.json`, `curves.png`, `topology.png`; `profile/` if asked for; `lock.json` while a
    process works on it.

    Attributes:
        path: the folder.
        config: the part of the configuration that determines results, as plain containers.
        config_text: the whole of it, as YAML.
        checkpoints: of this run.
        new: whether this process made the folder.
        labels: what the run is trained for, for loggers.
    """

    def __init__(self, path: Path, *, config: Mapping[str, object], config_text: str) -> None:
        self.path = path
        self.config = config
        self.config_text = config_text
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._metrics: TextIO | None = None
        self._lock: Lock | None = None
        self.new = False
        self._device = ""
        self.labels: Mapping[str, str] = {}
        self._made: list[Path] = []  # folders above it that were not there, the innermost first

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
            resume: "auto" continues the newest folder of this name if there is one, and says
                why there is none.
            config: nested plain containers, the part that determines results.
            config_text: the whole configuration as YAML, interpolations resolved.
            overrides: of the command line.

        Raises:
            UserError: the folder to continue was made with another configuration, another process
                works on it, or nothing can be written.
        """

        def find() -> RunDirectory:
            try:
                draft = _Draft(config_text, overrides, str(world.device))
                made = [folder for folder in (root, *root.parents) if not folder.exists()]
                while True:
                    path = newest(root, name) if resume == "auto" else None
                    found = path is not None
                    if path is None:
                        path = draft.publish(root, name, anew=resume == "never")
                        if path is None:  # another process has just made it
                            continue
                    directory = cls(path, config=config, config_text=config_text)
                    directory._made, directory._device = made, draft.device
                    directory._enter(None if found else draft.lock)
                    if not found and resume == "auto":
                        say(f"resume=auto: {_nothing_to_continue(root, path, config)}")
                    return directory
            except OSError as error:
                where = error.filename or root
                raise UserError(
                    f"runs: expected a folder that can be written, got {root} ({where}: "
                    f"{error.strerror})"
                ) from error

        directory = world.first(find)
        path = world.from_main(None if directory is None else directory.path)
        assert path is not None
        return directory or cls(path, config=config, config_text=config_text)

    def _enter(self, lock: Lock | None) -> None:
        """Take hold of the folder; of one that was there, see whether it is this run's."""
        self.new = lock is not None
        if lock is None and self.finished:
            self._require_same()
            return
        if lock is None:
            lock = Lock(self.path)
            lock.acquire()
        self._lock = lock
        try:
            for left in (*self.path.glob(".*.tmp"), *self.checkpoints.folder.glob(".*.tmp")):
                left.unlink()  # by a process that was killed
            if not self.new:
                self._require_same()
        except BaseException:
            self.close()
            raise

    def _require_same(self) -> None:
        """Raise a `UserError` where the folder is of another run."""
        path = self.path / "config.yaml"
        try:
            part = results_part(read_mapping("run", path, TRAINING_CONFIG))
        except UserError as error:
            if path.is_dir() and not path.is_symlink():
                raise UserError(f"{path}: expected a file, got a folder") from error
            # What the run is, its checkpoint tells as well.
            say(f"warning: {error}; this command's takes its place")
        else:
            require_same_config(
                {key: part[key] for key in self.config if key in part}, self.config, self.path
            )

    @property
    def finished(self) -> bool:
        """Whether the run has its summary already."""
        return read_summary(self.path / "summary.json") is not None

    def summary(self) -> dict[str, Any]:
        """Return the summary of a finished run."""
        summary = read_summary(self.path / "summary.json")
        assert summary is not None, "finished comes first"
        return summary

    def require_held(self) -> None:
        """Raise a `UserError` where another process has taken the folder meanwhile."""
        if self._lock is not None:
            self._lock.require()

    def open_metrics(self, step: int) -> list[dict[str, Any]]:
        """Open `metrics.jsonl` for rows after `step`, dropping those that are there already.

        They stem from steps after the checkpoint that a killed run is resumed from; they
        will be computed, and written, again. Before, nothing changes in the folder of such a run.

        Returns:
            The rows that stay.

        Raises:
            UserError: there is a folder in its place.
        """
        path = self.path / "metrics.jsonl"
        if path.is_dir() and not path.is_symlink():
            raise UserError(f"{path}: expected a file, got a folder")
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        if step and not kept:
            say(f"warning: {path} has no rows of the first {step} steps")
        if not self.new:
            self.checkpoints.folder.mkdir(exist_ok=True)
            replace_text(self.path / "config.yaml", self.config_text)
            number = len(list(self.path.glob("env-resume-*.json"))) + 1
            text = to_json(environment(self._device), indent=2)
            replace_text(self.path / f"env-resume-{number}.json", text)
        replace_text(path, "".join(to_json(row) for row in kept))
        self._metrics = open(path, "a", buffering=1, opener=own_descriptor)  # noqa: SIM115
        return kept

    def append(self, row: Mapping[str, object]) -> None:
        """Append one row to `metrics.jsonl`, visible to readers at once."""
        assert self._metrics is not None, "open_metrics comes first"
        self._metrics.write(to_json(row))

    def sync_metrics(self) -> None:
        """Bring the rows to disk, so that no checkpoint is ever ahead of them."""
        assert self._metrics is not None, "open_metrics comes first"
        self._metrics.flush()
        os.fsync(self._metrics.fileno())

    def keep_outcomes(self, outcomes: Sequence[Tensor]) -> None:
        """Write what the task says of each validation sample, in order; nothing if that is nothing.

        Args:
            outcomes: `[B, 2]` each, as of `Task.outcomes`.
        """
        if outcomes:
            with replacing(self.path / OUTCOMES) as file:
                np.save(file, torch.cat([*outcomes]).float().numpy())

    def finish(self, summary: Mapping[str, object]) -> None:
        """Write `summary.json`, which marks the run as finished."""
        replace_text(self.path / "summary.json", to_json(summary, indent=2))

    def close(self) -> None:
        """Close `metrics.jsonl` and let go of the folder. Again does nothing."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def discard(self) -> None:
        """Remove the folder of a run that was refused before its first step, if it is new."""
        if self.new and not self.checkpoints.last.exists():
            self.close()
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # another run may have come there
                for folder in self._made:
                    folder.rmdir()


class _Draft:
    """A new folder that appears whole, held by this process, or not at all."""

    def __init__(self, config_text: str, overrides: Iterable[str], device: str) -> None:
        self.config_text, self.overrides, self.device = config_text, list(overrides), device

    def publish(self, root: Path, name: str, *, anew: bool) -> Path | None:
        """Make it as `name`, or with a suffix where that exists.

        Args:
            root, name: of the folder.
            anew: whether other runs of this name do not matter.

        Returns:
            None if, unless `anew`, another process was faster.
        """
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        draft = temporary_name(root / name)
        draft.mkdir()
        try:
            self.lock = Lock(draft)
            self.lock.acquire()
            self._fill(draft)
            number = 1
            while True:
                path = root / (name if number == 1 else f"{name}-{number}")
                try:
                    os.rename(draft, path)  # replaces nothing but an empty folder
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                if not anew and is_run(path):
                    self.lock.release()
                    shutil.rmtree(draft)
                    return None
                number += 1
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        self.lock.path = path / self.lock.path.name
        sync(root)
        return path

    def _fill(self, draft: Path) -> None:
        (draft / "checkpoints").mkdir()
        # A JSON string is a YAML string, whatever it holds.
        lines = [f"- {json.dumps(line, ensure_ascii=False)}\n" for line in self.overrides]
        replace_text(draft / "overrides.yaml", "".join(lines) or "[]\n")
        replace_text(draft / "env.json", to_json(environment(self.device), indent=2))
        replace_text(draft / "config.yaml", self.config_text)


def can_continue(root: Path, name: str) -> bool:
    """Whether there is a run called `name` in `root` with a checkpoint to go on from."""
    path = newest(root, name)
    return path is not None and (path / "checkpoints" / "last.pt").exists()


def _nothing_to_continue(root: Path, new: Path, config: Mapping[str, object]) -> str:
    """Why a run begins anew: which of the newest runs is nearest to it, and what sets it apart."""
    text = f"no run {new.name} to continue in {root}, a new one begins"
    others = [path for path in root.iterdir() if path != new and (path / "config.yaml").is_file()]
    nearest: list[str] | None = None
    for path in sorted(others, key=lambda path: path.stat().st_mtime)[: -COMPARED - 1 : -1]:
        try:
            there = read_mapping("run", path / "config.yaml", TRAINING_CONFIG)
        except UserError:
            continue
        apart = list(differences(results_part(there), config))
        if len(apart) <= FEW and (nearest is None or len(apart) < len(nearest)):
            nearest = apart
            what = ", ".join(apart) or "its name or where its data lie"
            hint = f"; the nearest is {path.name}, which differs in {what}"
    return text if nearest is None else text + hint


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
        "packages": {name: package_version(name) for name in _PACKAGES},
        "command": [sys.executable, *sys.argv],
    }


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
