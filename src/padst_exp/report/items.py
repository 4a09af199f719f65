"""What every item that runs were tested on said, beside their table: <experiment>.safetensors.

Intervals over items can so be made again where the runs themselves are gone, as the rows can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from padst_exp.atomic import replacing
from padst_exp.files import reading
from padst_exp.report.runs import MOST_BYTES, Run
from padst_exp.report.statistics import Floats, is_figure_of

Row = Mapping[str, Any]


def collected(table: Path, rows: Iterable[Row], runs: Mapping[str, Run]) -> dict[str, Floats]:
    """The outcomes of the items of each row that has them, `[N, 2]`, by the name of its run.

    Args:
        table: of an experiment, `.csv`; what is kept lies beside it.
        rows: of it.
        runs: those that are there, by name. What is kept counts for the others.

    Raises:
        UserError: what is kept is damaged.
    """
    kept = _read(table.with_suffix(".safetensors"))
    found = {}
    for row in rows:
        name = str(row["run"])
        outcomes = runs[name].outcomes() if name in runs else kept.get(name)
        if outcomes is not None and is_figure_of(outcomes, str(row["metric"]), row["value"]):
            found[name] = outcomes
    return found


def keep(table: Path, outcomes: Mapping[str, Floats]) -> None:
    """Write what `collected` found beside its table; not nothing, and not more than it reads."""
    content = save({name: _small(each) for name, each in sorted(outcomes.items())})
    if outcomes and len(content) <= MOST_BYTES:
        with replacing(table.with_suffix(".safetensors")) as file:
            file.write(content)


def _read(path: Path) -> dict[str, Floats]:
    if not path.exists():
        return {}
    with reading("out", path, "outcomes of items that a report wrote"):
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        return {name: _whole(each) for name, each in load(path.read_bytes()).items()}


def _small(outcomes: Floats) -> NDArray[Any]:
    """Bools where every item was right or wrong: `[N]`."""
    right, of = outcomes.T
    if (of == 1).all() and ((right == 0) | (right == 1)).all():
        return right.astype(bool)
    return outcomes.astype(np.float32)


def _whole(kept: NDArray[Any]) -> Floats:
    if kept.dtype == bool and kept.ndim == 1:
        return np.stack([kept, np.ones_like(kept)], axis=1).astype(np.float64)
    if kept.dtype != np.float32 or kept.ndim != 2 or kept.shape[1] != 2:
        raise ValueError(f"{kept.dtype} of shape {kept.shape}")
    return kept.astype(np.float64)
