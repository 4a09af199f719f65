"""Rows of timings, and the files they are written to."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from padst_exp.bench.session import Session
from padst_exp.bench.timing import fastest, quantiles, ratio

Row = dict[str, object]

SCOPES = {"all": "all block linears", "dense_qkv": "block linears, QKV dense"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one row is about.

    Args:
        case: a layer or a model.
        tokens: rows of x of a layer, samples of a model's batch.
        what: the pass that is timed.
        structure: with all its parameters; "dense".
        form: how it is computed.
        scope: which layers of a model are sparse; whose accuracy is looked up.
        permutation: "none", "soft" or "hard".
        density_asked: of the sparse layers.
        density: of them, realised.
        side: "dense": what PyTorch does by itself. "strong": other dense kernels. Else "sparse".
        floor: seconds that reading, writing and multiplying take at least; None: unknown.
        dispatcher: what the dispatcher chooses here; "" where it has no say.
    """

    case: str
    tokens: int
    what: str
    structure: str
    form: str
    scope: str
    permutation: str = "none"
    density_asked: float = 1.0
    density: float = 1.0
    side: Literal["dense", "strong", "sparse"] = "sparse"
    floor: float | None = None
    dispatcher: str = ""


def timing_rows(
    session: Session,
    suite: str,
    lines: Mapping[str, Line],
    samples: Mapping[str, list[float]],
    failed: Mapping[str, str],
) -> list[Row]:
    """A row for each line, in their order; without numbers for those that `failed`."""
    usual = [n for n in samples if n in lines and lines[n].side == "dense"]
    dense = [n for n in samples if n in lines and lines[n].side != "sparse"]
    rows = []
    for name, line in lines.items():
        row: Row = {
            "suite": suite,
            "case": line.case,
            "tokens": line.tokens,
            "pass": line.what,
            "structure": line.structure,
            "form": line.form,
            "scope": SCOPES.get(line.scope, line.scope),
            "permutation": line.permutation,
            "density_asked": round(line.density_asked, 4),
            "density": round(line.density, 4),
            **dict.fromkeys(_NUMBERS, ""),
            "dispatcher": line.dispatcher,
            "accuracy": _accuracy(session, line),
            "note": failed.get(name, ""),
            **session.environment,
            **session.ceilings.row(),
        }
        if name in samples:
            row.update(_numbers(name, line, samples, usual, dense))
        rows.append(row)
    return rows


_NUMBERS = (
    "p20_ms", "p50_ms", "p80_ms", "rounds", "dense_form", "dense_ms", "ratio", "ratio_q1",
    "ratio_q3", "strongest_form", "strongest_ms", "ratio_strongest", "floor_ms", "floor_share",
)  # fmt: skip


def _numbers(
    name: str,
    line: Line,
    samples: Mapping[str, list[float]],
    usual: list[str],
    dense: list[str],
) -> Row:
    low, middle, high = quantiles(samples[name])
    row: Row = {
        "p20_ms": _digits(low),
        "p50_ms": _digits(middle),
        "p80_ms": _digits(high),
        "rounds": len(samples[name]),
    }
    if usual:
        reference = fastest(samples, usual)
        first, half, third = ratio(samples[reference], samples[name])
        row |= {
            "dense_form": reference,
            "dense_ms": _digits(quantiles(samples[reference])[1]),
            "ratio": round(half, 3),
            "ratio_q1": round(first, 3),
            "ratio_q3": round(third, 3),
        }
    if dense:
        reference = fastest(samples, dense)
        row |= {
            "strongest_form": reference,
            "strongest_ms": _digits(quantiles(samples[reference])[1]),
            "ratio_strongest": round(ratio(samples[reference], samples[name])[1], 3),
        }
    if line.floor is not None:
        row |= {
            "floor_ms": _digits(1e3 * line.floor),
            "floor_share": round(line.floor / float(np.median(samples[name])), 3),
        }
    return row


def _accuracy(session: Session, line: Line) -> str:
    if line.side != "sparse":
        return ""
    return session.accuracies.of(line.structure, line.density_asked, line.scope)


def _digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def readable(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows that all have the columns of the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of `write_csv`, all values as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
