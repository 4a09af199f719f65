"""A picture of each table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from padst_exp.bench.report import readable
from padst_exp.engine.plots import BLUE, GREEN, GREY, INK, ORANGE, STYLE

Row = dict[str, str]
Rows = Sequence[Row]

VIOLET, RED = "#8b5fb0", "#c2457a"
# Hue for the family; smaller units are lighter.
FAMILIES = {"nm": BLUE, "block": ORANGE, "diag": GREEN, "unstructured": VIOLET}
# A peer has the colour of the structure that it is for, dashed.
OTHERS = {"dense by oneDNN": INK, "torch BSR": ORANGE, "torch CSR": VIOLET, "torch 2:4": RED}
OURS = ("packed", "condensed")
MASKED = "masked dense"


def draw(suite: str, rows: Rows, path: Path) -> Path | None:
    """Draw the picture of a table to `path`; None where there is none to draw."""
    drawings = {
        "layers": _layers,
        "model_inference": _models,
        "model_train": _models,
        "memory": _memory,
    }
    if suite not in drawings:
        return None
    with rc_context(STYLE):
        figure = drawings[suite](rows)
        if figure is None:
            return None
        figure.savefig(path)
    return path


def _layers(rows: Rows) -> Figure | None:
    """Speed-up over tokens: a column for each layer, a row for each pass."""
    # Products with and without a folded permutation; of the two the faster is drawn.
    own = [row for row in rows if row["ratio"] and row["permutation"] != "soft"]
    sparse = [row for row in own if row["structure"] not in ("dense", "2:4")]
    if not sparse:
        return None
    density = sparse[0]["density_asked"]
    every = list(dict.fromkeys(row["case"] for row in sparse))
    cases = every[:4]
    passes = list(dict.fromkeys(row["pass"] for row in sparse))
    tokens = sorted({int(row["tokens"]) for row in sparse})
    curves: dict[str, dict[tuple[str, str, int], float]] = {}
    for row in own:
        name = _curve(row)
        if name is not None and row["density_asked"] in (density, "1.0"):
            # Of several forms of one structure the fastest is drawn.
            place = row["case"], row["pass"], int(row["tokens"])
            curve = curves.setdefault(name, {})
            curve[place] = max(curve.get(place, 0.0), float(row["ratio"]))
    size = (3.1 * len(cases) + 0.4, 3.0 * len(passes) + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(passes), len(cases), squeeze=False, sharey=True, sharex=True)
    styles = _styles(list(curves))
    for down, what in enumerate(passes):
        for across, case in enumerate(cases):
            axis = grid[down, across]
            axis.set_title(f"{case}, {what}")
            axis.axhline(1, color=INK, lw=1)
            for name, curve in curves.items():
                points = [(at, curve[case, what, t]) for at, t in enumerate(tokens)
                          if (case, what, t) in curve]  # fmt: skip
                if points:
                    axis.plot(*zip(*points, strict=True), label=name, **styles[name])
            _ratio_axis(axis)
            axis.set_xticks(range(len(tokens)), [f"{t:,}" for t in tokens])
            if down == len(passes) - 1:
                axis.set_xlabel("tokens")
            if across == 0:
                axis.set_ylabel("times as fast as dense, eager or compiled")
    handles = {}
    for axis in grid.flat:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[name] = handle
    order = sorted(handles, key=lambda name: (name in OTHERS or name == MASKED, _family(name)))
    figure.legend(
        [handles[name] for name in order], order, loc="outside lower center",
        ncols=min(int(size[0] // 2), len(order)),
    )  # fmt: skip
    first = rows[0]
    some = "" if cases == every else f"; the first {len(cases)} of {len(every)} layers"
    title = f"Density {density} on {first['device']}, {first['dtype']}{some}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _curve(row: Row) -> str | None:
    """The curve that a row belongs to; None for what is not drawn."""
    if row["structure"] == "dense":
        return "dense by oneDNN" if row["form"].startswith("oneDNN") else None
    if row["form"].startswith(OURS):
        return row["structure"]
    if row["form"].startswith(("torch", "masked")):
        return row["form"].partition(",")[0]
    return None


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colours by family, lighter from member to member; what is not ours is dashed."""
    styles: dict[str, dict[str, Any]] = {}
    members: dict[str, int] = {}
    for name in names:
        family = name.partition(" ")[0]
        if family in FAMILIES:
            number = members.get(family, 0)
            members[family] = number + 1
            shade = _lighter(FAMILIES[family], 0.2 * number)
            styles[name] = {"color": shade, "lw": 1.7, "marker": "o", "ms": 4}
        else:
            color = OTHERS.get(name, GREY)
            styles[name] = {"color": color, "lw": 1.3, "ls": (0, (4, 2)), "marker": ".", "ms": 4}
    return styles


def _family(name: str) -> int:
    family = name.partition(" ")[0]
    return [*FAMILIES, family].index(family)


def _lighter(color: str, share: float) -> tuple[float, ...]:
    return tuple(part + (1 - part) * min(share, 0.75) for part in to_rgb(color))


def _ratio_axis(axis: Axes) -> None:
    """Ratios on a logarithmic axis, with the numbers that people think in."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(FixedLocator([0.1, 0.25, 0.5, 1, 2, 4, 8, 16]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.text(0.995, 1, "dense", transform=axis.get_yaxis_transform(), ha="right", va="bottom",
              fontsize=7.5)  # fmt: skip


def _models(rows: Rows) -> Figure | None:
    """Bars of speed-up, a panel for each model, batch and pass; every side in its fastest form."""
    fastest: dict[tuple[str, ...], Row] = {}
    for row in (row for row in rows if row["ratio"]):
        # Dense ones differ in their form alone.
        form = row["form"] if row["structure"] == "dense" else ""
        side = (*_panel(row), row["structure"], row["scope"], row["permutation"], form)
        if side not in fastest or float(row["ratio"]) > float(fastest[side]["ratio"]):
            fastest[side] = row
    timed = list(fastest.values())
    panels = list(dict.fromkeys((row["case"], row["tokens"], row["pass"]) for row in timed))
    if not panels:
        return None
    members = [[row for row in timed if _panel(row) == panel] for panel in panels]
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    tallest = max(len(own) for own in members)
    figure = Figure(figsize=(7.2 * across, down * (0.24 * tallest + 0.9)), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axis, panel, own in zip(grid.flat, panels, members, strict=False):
        case, batch, what = panel
        axis.set_title(f"{case}, batch {batch}: {what}")
        values = [float(row["ratio"]) for row in own]
        axis.barh(range(len(own)), values, color=[_bar_color(row) for row in own], height=0.72)
        axis.set_yticks(range(len(own)), [_bar_name(row) for row in own])
        axis.invert_yaxis()
        axis.axvline(1, color=INK, lw=1)
        axis.grid(visible=False, axis="y")
        for at, (row, value) in enumerate(zip(own, values, strict=True)):
            text = f" {value:.2f}x, {readable(float(row['p50_ms']))} ms"
            axis.text(value, at, text, va="center", fontsize=8)
        axis.set_xlim(0, 1.3 * max(values))
        axis.set_xlabel("times as fast as the faster of eager and compiled dense")
    for axis in grid.flat[len(panels) :]:
        axis.set_axis_off()
    return figure


def _panel(row: Row) -> tuple[str, str, str]:
    return row["case"], row["tokens"], row["pass"]


def _bar_name(row: Row) -> str:
    if row["structure"] == "dense":
        return f"dense, {row['form']}"
    scope = "QKV dense, " if "dense" in row["scope"] else ""
    soft = "soft phase, " if row["permutation"] == "soft" else ""
    return f"{row['structure']}, {scope}{soft}{row['form']}"


def _bar_color(row: Row) -> Any:
    if row["structure"] == "dense":
        return GREY
    color = FAMILIES.get(row["structure"].partition(" ")[0], VIOLET)
    faded = 0.35 * ("dense" in row["scope"]) + 0.3 * (row["permutation"] == "soft")
    return _lighter(color, faded)


def _memory(rows: Rows) -> Figure | None:
    """Stacked bars of what is kept, and a mark at the peak."""
    panels = list(dict.fromkeys((row["case"], row["batch"]) for row in rows))
    members = [[row for row in rows if (row["case"], row["batch"]) == panel] for panel in panels]
    tallest = max(len(own) for own in members)
    size = (7.2 * len(panels), 0.3 * tallest + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    parts = {"parameters": BLUE, "gradients": ORANGE, "moments": GREEN, "indices": VIOLET}
    for axis, (case, batch), own in zip(grid.flat, panels, members, strict=True):
        axis.set_title(f"{case}, batch {batch}: training step")
        places = range(len(own))
        start = [0.0] * len(own)
        for part, color in parts.items():
            widths = [int(row[f"{part}_bytes"]) / 1e6 for row in own]
            axis.barh(places, widths, left=start, color=color, height=0.62, label=part)
            start = [a + b for a, b in zip(start, widths, strict=True)]
        peaks = [int(row["peak_bytes"]) / 1e6 for row in own]
        axis.scatter(peaks, places, marker="|", s=120, color=INK, zorder=3, label="peak")
        for at, (row, peak) in enumerate(zip(own, peaks, strict=True)):
            text = f"  {float(row['peak_share']):.2f} of dense"
            axis.text(peak, at, text, va="center", fontsize=8)
        names = [_memory_name(row) for row in own]
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set_xlim(0, 1.25 * max(peaks))
        axis.set_xlabel("MB")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _memory_name(row: Row) -> str:
    return "dense" if row["structure"] == "dense" else _bar_name({**row, "form": ""}).rstrip(", ")
