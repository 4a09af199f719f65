"""Which folder is that of a run."""

import glob
import os
from pathlib import Path


def newest(root: Path, name: str) -> Path | None:
    """Return the folder called `name`, or `name` with the highest suffix, that is a run's."""
    found = {1: root / name}
    for path in root.glob(f"{glob.escape(name)}-*"):
        suffix = path.name.removeprefix(f"{name}-")
        if suffix.isdigit():
            found[int(suffix)] = path
    runs = [number for number in sorted(found) if is_run(found[number])]
    return found[runs[-1]] if runs else None


def is_run(path: Path) -> bool:
    """Whether anything in this folder is of a run."""
    marks = (path / "config.yaml", path / "checkpoints" / "last.pt", path / "lock.json")
    return any(os.path.lexists(mark) for mark in marks)
