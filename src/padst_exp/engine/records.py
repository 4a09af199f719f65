"""Rows of metrics and summaries as files hold them: valid JSON, in which NaN is null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from padst_exp.errors import UserError
from padst_exp.files import reading

OUTCOMES = "outcomes.npy"
"""In a run directory, float32 `[N, 2]`: the rows of `Task.outcomes` of the last evaluation."""

Rows = list[dict[str, Any]]


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON that every reader can parse, and a line break.

    No JSON has a number for NaN or an infinity: they become null.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n"


def read_metrics(path: Path) -> Rows:
    """The rows of a `metrics.jsonl`, nulls as NaN; none where there is no such file.

    Lines that are no rows are left out: a kill cuts the last one short.

    Raises:
        UserError: it is no file, or cannot be read.
    """
    rows: Rows = []
    with reading("run", path, "the metrics of a run"):
        content = path.read_bytes() if path.exists() else b""
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(_numbers(row))
    return rows


def read_summary(path: Path) -> dict[str, Any] | None:
    """The contents of a `summary.json`; None where it is missing or damaged."""
    try:
        with reading("run", path, "the summary of a run"):
            summary: dict[str, Any] = json.loads(path.read_bytes())
            final = summary["final"][summary["monitor"]]
    except UserError:
        return None
    return summary if final is None or isinstance(final, int | float) else None


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return math.nan if value is None else value
