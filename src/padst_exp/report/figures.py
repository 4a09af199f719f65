"""Figures as SVG that takes the colours of the page around it, dark or light."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from padst_exp.engine.plots import STYLE

# Of the page: light, dark. Structures by hues that stay apart for the colour-blind, and by marks.
COLOURS: Mapping[str, tuple[str, str]] = {
    "ink": ("#1c2027", "#e7e9ee"),
    "muted": ("#5a6372", "#a3abb9"),
    "line": ("#d9dde4", "#3a414d"),
    "card": ("#f7f8fa", "#1b1f26"),
    "dense": ("#6b7482", "#aab2bf"),
    "unstructured": ("#a87400", "#e6b83f"),
    "nm": ("#0072b2", "#5cb4ef"),
    "block": ("#d45d00", "#ff944d"),
    "diag": ("#00916a", "#3fcfa1"),
    "fan_in": ("#b5508a", "#f09ccb"),
    "butterfly": ("#694fb1", "#b6a0f6"),
    "shuffled_block": ("#7b5331", "#cda07a"),
}
MARKS = {
    "dense": "h", "unstructured": "X", "nm": "o", "block": "s", "diag": "D", "fan_in": "^",
    "butterfly": "v", "shuffled_block": "P",
}  # fmt: skip
DASHES: Mapping[str, Any] = {"none": (0, (1, 1.6)), "random": (0, (5, 2)), "learned": "solid"}

WIDTH = 4.3
LONGEST_LABEL = 27
MOST_PIXELS = 192

FILLS = {"none": "none", "random": "left", "learned": "full"}
"""Hollow without a permutation, half with a random one, filled with a learned one."""

_INK, _MUTED, _LINE, _CARD = (COLOURS[name][0] for name in ("ink", "muted", "line", "card"))
_STYLE: Any = {
    **STYLE,
    "svg.fonttype": "none",
    "text.parse_math": False,  # what is drawn may come from anybody's files
    "axes.unicode_minus": True,
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Look:
    """How an arm is drawn: colour and mark by structure, fill and line by permutation.

    Several lines of one look in one plot are `variant` 0, 1, ...: the others have other marks.
    """

    structure: str
    permutation: str
    variant: int = 0

    @property
    def colour(self) -> str:
        """As matplotlib is given it; the page puts its own in its place."""
        return COLOURS.get(self.structure, COLOURS["dense"])[0]

    def line(self, **more: Any) -> dict[str, Any]:
        """Keywords of `Axes.plot`."""
        fill = FILLS.get(self.permutation, "full")
        marks = list(MARKS.values())
        own = marks.index(MARKS.get(self.structure, "h"))
        return {
            "color": self.colour, "marker": marks[(own + self.variant) % len(marks)], "ms": 5.5,
            "fillstyle": "full" if fill == "none" else fill,
            "mfc": _CARD if fill == "none" else self.colour, "mfcalt": _CARD,
            "mec": self.colour, "mew": 1.2, "lw": 1.4,
            "ls": DASHES.get(self.permutation, "solid"), **more,
        }  # fmt: skip


@dataclass(frozen=True)
class Series:
    """Points of one arm: at each x a value, with its interval where there is one."""

    label: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float] | None]


def against(series: Sequence[Series], name: str, metric: str) -> str:
    """Lines over a number called `name`; a dense model is a level to compare with."""
    with _drawn(3.0) as (figure, axis):
        for one in series:
            if one.look.structure == "dense":
                axis.axhline(one.y[0], color=one.look.colour, lw=1.2, ls=(0, (4, 3)))
                continue
            axis.plot(one.x, one.y, **one.look.line())
            for x, interval in zip(one.x, one.intervals, strict=True):
                if interval is not None:
                    axis.plot([x, x], interval, color=one.look.colour, lw=1, alpha=0.6)
        ticks = sorted({x for one in series for x in one.x})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.set_xlabel(name)
        axis.set_ylabel(metric)
        _quiet(axis)
    return svg(figure, f"{metric} against {name}")


def arms(series: Sequence[Series], metric: str) -> str:
    """One line for each arm: its mean and interval."""
    with _drawn(0.75 + 0.24 * len(series)) as (figure, axis):
        for row, one in enumerate(series):
            interval = one.intervals[0]
            if interval is not None:
                axis.plot(interval, [row, row], color=one.look.colour, lw=2, alpha=0.45)
            axis.plot(one.y, [row], **one.look.line(ls="none"))
        axis.set_xlabel("mean and 95% interval")
        _lines(axis, [one.label for one in series])
    return svg(figure, f"{metric} of each arm")


def differences(series: Sequence[Series], names: Sequence[str], *, lower_is_better: bool) -> str:
    """One line for each contrast: its differences, beside each other, and their intervals.

    Args:
        series: x is the number of the contrast, y the difference.
        names: of the contrasts.
        lower_is_better: of what is subtracted.
    """
    with _drawn(0.75 + (0.16 + 0.08 * len(series)) * len(names)) as (figure, axis):
        axis.axvline(0, color=_INK, lw=0.9, ls=(0, (4, 3)))
        for place, one in enumerate(series):
            rows = [x + 0.55 * ((place + 0.5) / len(series) - 0.5) for x in one.x]
            for row, interval in zip(rows, one.intervals, strict=True):
                if interval is not None:
                    axis.plot(interval, [row, row], color=one.look.colour, lw=2, alpha=0.45)
            axis.plot(one.y, rows, **one.look.line(ls="none"))
        axis.set_xlabel(f"{'left' if lower_is_better else 'right'} of 0: the first is better")
        _lines(axis, names)
    return svg(figure, f"differences: {', '.join(names)}")


def against_speed(series: Sequence[Series], metric: str, *, lower_is_better: bool) -> str:
    """Points over times as fast as dense, and the front of those that nothing beats."""
    with _drawn(3.0) as (figure, axis):
        points = [(one.x[0], one.y[0]) for one in series]
        front = frontier(points, lower_is_better=lower_is_better)
        axis.plot(*zip(*front, strict=True), color=_MUTED, lw=1, drawstyle="steps-pre", zorder=1)
        for one in series:
            interval = one.intervals[0]
            if interval is not None:
                axis.plot([one.x[0], one.x[0]], interval, color=one.look.colour, lw=1.2, alpha=0.5)
            axis.plot(one.x, one.y, **one.look.line(ls="none"))
        axis.axvline(1, color=_INK, lw=0.9, ls=(0, (4, 3)))
        _doublings(axis, [x for x, _ in points])
        axis.set_xlabel("times as fast as dense (1 is dense; log scale)")
        axis.set_ylabel(metric)
        _quiet(axis)
    return svg(figure, f"{metric} against measured speed")


def frontier(
    points: Sequence[tuple[float, float]], *, lower_is_better: bool
) -> list[tuple[float, float]]:
    """The points (speed, value) that no other one beats in both, by growing speed."""
    sign = -1 if lower_is_better else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front[::-1]


def penalties(
    curves: Sequence[tuple[Look, Sequence[tuple[float, float]], Sequence[tuple[float, float]]]],
) -> str:
    """Mean penalty over the share of training, and a dot where a choice hardened."""
    with _drawn(2.8) as (figure, axis):
        for look, curve, hardened in curves:
            if curve:
                axis.plot(*zip(*curve, strict=True), color=look.colour, lw=1.5)
            if hardened:
                axis.plot(*zip(*hardened, strict=True), **look.line(ls="none", ms=4, alpha=0.75))
        axis.set_xlim(0, 100)
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel("share of training (%)")
        axis.set_ylabel("penalty (0: a permutation)")
        _quiet(axis)
    return svg(figure, "penalty of soft permutations along training")


def timings(rows: Sequence[tuple[str, Look, float, float]]) -> str:
    """Bars of milliseconds, each with the least that the machine allows as a tick.

    Args:
        rows: label, look, milliseconds, and the floor of the roofline (NaN for unknown).
    """
    with _drawn(0.8 + 0.22 * len(rows)) as (figure, axis):
        for row, (_, look, value, floor) in enumerate(rows):
            axis.barh(row, value, height=0.62, color=look.colour, alpha=0.85)
            if math.isfinite(floor):
                axis.plot([floor, floor], [row - 0.42, row + 0.42], color=_INK, lw=1.8)
        axis.set_xlabel("milliseconds; tick: floor of the roofline")
        _lines(axis, [label for label, *_ in rows])
    return svg(figure, f"milliseconds of {', '.join(label for label, *_ in rows)}")


def bitmap(matrix: NDArray[np.bool_], structure: str) -> str:
    """A matrix as a PNG in a data URI: True in the colour of a structure, False clear."""
    matrix = _pooled(matrix)
    pixels = np.zeros((*matrix.shape, 4), dtype=np.uint8)
    # Halfway between those of a light and of a dark page: a picture cannot change its own.
    pair = [bytes.fromhex(colour[1:]) for colour in COLOURS.get(structure, COLOURS["dense"])]
    pixels[matrix] = (*((one + other) // 2 for one, other in zip(*pair, strict=True)), 255)
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@cache
def swatch(look: Look, *, line: bool = True) -> str:
    """A small picture of how an arm is drawn, for a legend; without `line` its mark alone."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(0.42, 0.17))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_axis_off()
        style = look.line(markevery=[1]) if line else look.line(markevery=[1], ls="none")
        axis.plot([0, 1, 2], [0, 0, 0], **style)
        axis.set_xlim(-0.2, 2.2)
        axis.set_ylim(-1, 1)
        return svg(figure, f"{look.structure}, {look.permutation}, {look.variant}, {line}")


def svg(figure: Figure, title: str) -> str:
    """A figure as an element of a page, with variables of it for the colours of `COLOURS`."""
    file = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("\n", " ")
    text = re.sub(r"<metadata>.*?</metadata>", "", text)
    text = re.sub(r' id="[A-Za-z.]+_\d+"', "", text)  # nothing refers to these
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    return re.sub(r" {2,}", " ", text).strip()


@contextmanager
def _drawn(height: float) -> Iterator[tuple[Figure, Axes]]:
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.subplots()


def _quiet(axis: Axes) -> None:
    axis.tick_params(length=2.5, width=0.6)
    for side in ("left", "bottom"):
        axis.spines[side].set_linewidth(0.7)


def _lines(axis: Axes, labels: Sequence[str]) -> None:
    """One line for each label, the first at the top."""
    axis.set_yticks(range(len(labels)), [_short(label) for label in labels])
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    _quiet(axis)


def _doublings(axis: Axes, values: Sequence[float]) -> None:
    """A log axis with ticks at powers of two."""
    axis.set_xscale("log", base=2)
    low, high = min(*values, 1.0), max(*values, 1.0)
    exponents = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    axis.xaxis.set_major_locator(FixedLocator([2.0**exponent for exponent in exponents]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.set_xlim(low / 1.15, high * 1.15)


def _pooled(matrix: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A matrix of at most `MOST_PIXELS` a side: True where anything was."""
    for side in (0, 1):
        step = -(-matrix.shape[side] // MOST_PIXELS)
        starts = np.arange(0, matrix.shape[side], step)
        matrix = np.logical_or.reduceat(matrix, starts, axis=side)
    return matrix


def _short(label: str) -> str:
    """A label that leaves room for what it is beside."""
    if len(label) <= LONGEST_LABEL:
        return label
    return f"{label[: LONGEST_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"
