"""From rows to CSV files, a README of two screens, and a figure for each suite."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from padst_exp.engine.plots import BLUE, GREEN, GREY, INK, ORANGE, STYLE

SUITES = {
    "layers": "Single layers",
    "model_inference": "Inference of whole models",
    "model_train": "Training steps of whole models",
    "memory": "Memory of a training step",
}
MARK = "<!-- What follows is made. -->\n"
# Budgets round to whole units, so that densities of other shapes differ a little.
NEAR = 0.15
COLORS = {"nm": BLUE, "block": ORANGE, "diag": GREEN, "unstructured": "#8b5fb0"}
LookUp = Callable[[str, float, str], str]


def write(path: Path, rows: Iterable[dict[str, Any]], **columns: object) -> None:
    """Write rows, all with the same `columns` added, as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).assign(**columns).to_csv(path, index=False)


def publish(folder: Path, tables: Path) -> list[Path]:
    """Write README.md, from its mark on, and a figure for each suite, from the CSV files there.

    Args:
        folder: holds `<suite>-<device>-<dtype>.csv`.
        tables: folder of accuracies, results/tables; need not exist.
    """
    readme, reached, written = folder / "README.md", accuracies(tables), []
    old = readme.read_text() if readme.exists() else ""
    text = [old.partition(MARK)[0] + MARK]
    for suite, title in SUITES.items():
        frames = {path.name: _read(path) for path in sorted(folder.glob(f"{suite}-*.csv"))}
        if not frames:
            continue
        section = {"layers": _layers, "memory": _memory}.get(suite, _models)
        text.append(f"## {title}\n\n![{title}]({suite}.png)\n")
        for name, frame in frames.items():
            where = (
                "{device} {instructions}, {dtype}, {threads} thread(s), {clock} time, torch {torch}"
            )
            where += ", triton {triton}, commit {commit}, dirty={dirty}"
            where = where.format(**frame.iloc[0])
            text += [f"[{name}]({name}): {where}.\n", section(frame, reached)]
        if suite == "layers":
            text.append(_slower(list(frames.values())))
        with rc_context(STYLE):
            figure = Figure(layout="constrained")
            draw = _draw_layers if suite == "layers" else _draw_bars
            draw(figure, list(frames.values()))
            figure.savefig(folder / f"{suite}.png")
        written.append(folder / f"{suite}.png")
    readme.write_text("\n".join(text).rstrip() + "\n")
    return [*written, readme]


def _read(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, keep_default_na=False)
    numbers = [c for c in frame if c in ("ratio", "ratio_strongest", "p50_ms", "floor_share")]
    frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="coerce")
    return frame


def accuracies(tables: Path) -> LookUp:
    """Looks up by structure, density and scope what demo models reached, in one line."""
    wanted = ["dataset", "structure", "density", "seed", "value"]
    frames = [pd.read_csv(path)[wanted] for path in sorted(tables.glob("*_accuracy.csv"))]
    frame = pd.concat([pd.DataFrame(columns=wanted), *frames]).dropna()
    # A run can stand in more than one table.
    frame = frame.drop_duplicates(["dataset", "structure", "seed"])

    def look_up(structure: str, density: float, scope: str) -> str:
        near = (frame.density.astype(float) - density).abs() <= NEAR * density
        own = frame[near & (frame.structure == structure) & (scope == "all")]
        means = own.groupby("dataset")["value"].mean()
        return ", ".join(f"{name} {value:.1f}" for name, value in means.items()) or "-"

    return look_up


def markdown(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows) + "\n"


def _span(values: pd.Series[Any]) -> str:
    """Lowest to highest in three digits."""
    ends = dict.fromkeys(f"{end:.3g}" for end in (values.min(), values.max()))
    return " to ".join(ends) if values.notna().any() else ""


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """Timed rows of one layer by others than dense, with names for lines and curves.

    Kernels of one structure share a name, with the permutations that training has; peers have
    names of their own.
    """
    timed = frame[(frame.structure != "dense") & frame.ratio.notna()]
    permuted = timed.structure.isin(timed.structure[timed.permutation == "hard"])
    ours = timed.form.str.startswith(("packed", "exported"))
    name = timed.structure.where(ours, timed.structure + ", " + timed.form)
    state = timed.permutation.map({"soft": ", soft permutation"}).fillna("")
    timed = timed.assign(name=name + state, ours=ours)
    return timed[~(ours & permuted & (timed.permutation == "none"))]


def _best(frame: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """The fastest row by name, layer, tokens and pass, at the first density; that density."""
    density = float(frame.density_asked[frame.density_asked < 1].iloc[0])
    own = _named(frame[frame.density_asked == density]).sort_values("ratio", ascending=False)
    return own.drop_duplicates(["name", "case", "tokens", "pass"]).sort_index(), density


def _layers(frame: pd.DataFrame, reached: LookUp) -> str:
    """A line for each structure and peer: from the slowest to the fastest layer."""
    best, density = _best(frame)
    converted = frame[(frame["pass"] == "conversion") & (frame.density_asked == density)]
    cells = best.groupby(["pass", "tokens"]).groups
    lines = []
    for name, rows in best.groupby("name", sort=False):
        structure, ours = rows.structure.iloc[0], rows.ours.all()
        spans = [_span(rows.ratio[rows.index.intersection(cell)]) for cell in cells.values()]
        many = rows[(rows.tokens == rows.tokens.max()) & (rows["pass"] == "forward")]
        made = converted[(converted.structure == structure) & ours]
        steps = [_span(made.p50_ms[made.form == step]) for step in ("index", "export")]
        accuracy = reached(structure, density, "all") if ours else ""
        lines.append([name, *spans, _span(many.floor_share), *steps, accuracy])
    head = [f"density {density:g}, tokens", *(f"{what} {tokens}" for what, tokens in cells)]
    head += ["floor / forward", "index, ms", "export, ms", "accuracy"]
    keys = ["case", "tokens", "pass", "structure", "form", "density_asked"]
    both = frame.pivot_table(index=keys, columns="permutation", values="p50_ms")
    cost = (both.hard / both.none).median() - 1 if {"hard", "none"} <= set(both) else None
    text = "" if cost is None else f"\nA folded permutation costs {cost:+.1%}.\n"
    return markdown(head, lines) + text


def _slower(frames: Sequence[pd.DataFrame]) -> str:
    """Where our layers are slower than dense, and what the dispatcher trains them by there."""
    lines = []
    for frame in frames:
        own = _named(frame)
        for name, rows in own[own.ours].groupby("name", sort=False):
            slow = rows[rows.ratio < 1]
            columns = ("density_asked", "pass", "tokens", "dispatcher")
            found = [", ".join(map(str, sorted(slow[column].unique()))) for column in columns]
            line = [name, frame["dtype"].iloc[0], f"{len(slow)} of {len(rows)}", _span(slow.ratio)]
            lines += [line + found] if len(slow) else []
    head = ["slower than dense", "dtype", "cells", "ratio", "densities", "passes", "tokens"]
    return markdown([*head, "trained by"], lines) if lines else ""


def _models(frame: pd.DataFrame, reached: LookUp) -> str:
    """Every contender in its fastest form; dense ones in all forms."""
    frame = frame.assign(one=frame.form.where(frame.structure == "dense", ""), what=frame["pass"])
    keys = ["case", "tokens", "pass", "structure", "scope", "permutation", "one"]
    best = frame.sort_values("ratio", ascending=False).drop_duplicates(keys).sort_index()
    lines = []
    for row in best[best.ratio.notna()].itertuples():
        ratio = f"{row.ratio:.2f}"
        if row.strongest_form != row.dense_form:
            ratio += f" / {row.ratio_strongest:.2f}"
        name = f"{row.structure}, {row.form}" + (", soft" if row.permutation == "soft" else "")
        known = row.structure != "dense"
        accuracy = reached(row.structure, row.density_asked, row.scope) if known else ""
        model = f"{row.case}, batch {row.tokens}: {row.what}"
        lines.append([model, name, row.scope, row.density, f"{row.p50_ms:.4g}", ratio])
        lines[-1] += [row.floor_share, row.dispatcher, accuracy]
    head = ["model", "contender", "sparse layers", "density", "ms", "dense / this"]
    return markdown([*head, "floor / this", "products by", "accuracy"], lines)


def _memory(frame: pd.DataFrame, _: LookUp) -> str:
    sizes = [column for column in frame if column.endswith("_bytes")]
    rows = frame.assign(**{size: (frame[size] / 1e6).round(1) for size in sizes})
    shown = ["case", "tokens", "structure", "scope", "permutation", "density"]
    rows = rows[[*shown, *sizes, "kept_share", "peak_share"]]
    head = [column.replace("_bytes", ", MB").replace("_share", " / dense") for column in rows]
    return markdown(head, rows.itertuples(index=False))


def _draw_layers(figure: Figure, frames: Sequence[pd.DataFrame]) -> None:
    """Median speed-up of layers over tokens: a row for each table, a column for each pass.

    Hue for the family, lighter from member to member; dotted where it is not ours.
    """
    bests = [_best(frame)[0] for frame in frames]
    passes = list(bests[0]["pass"].unique())
    figure.set_size_inches(4.6 * len(passes) + 2, 3.6 * len(frames))
    grid = figure.subplots(len(frames), len(passes), squeeze=False, sharey=True)
    for (axes, best), what in itertools.product(zip(grid, bests, strict=True), passes):
        axis, rows, first = axes[passes.index(what)], best[best["pass"] == what], best.iloc[0]
        for name, own in rows.groupby("name", sort=False):
            family = str(name).partition(" ")[0].partition(",")[0]
            members = sum(str(line.get_label()).startswith(family) for line in axis.lines)
            own.groupby("tokens").ratio.median().plot(
                ax=axis, style=".-" if own.ours.all() else ".:", label=name,
                color=COLORS.get(family, GREY), alpha=max(0.3, 1 - 0.18 * members),
            )  # fmt: skip
        axis.set_title(f"{first.device}, {first['dtype']}, density {first.density_asked}: {what}")
        axis.axhline(1, color=INK, lw=1)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times as fast as dense")
        ticks = [1 / 4, 1 / 2, 1, 2, 4, 8, 16]
        axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
        axis.set_xticks(rows.tokens.unique(), [f"{tick:,}" for tick in rows.tokens.unique()])
        axis.minorticks_off()
    lines = {line.get_label(): line for axis in grid.flat for line in axis.lines[:-1]}
    figure.legend(list(lines.values()), list(lines), loc="outside right center")


def _draw_bars(figure: Figure, frames: Sequence[pd.DataFrame]) -> None:
    """Speed-ups of models, or shares of memory, beside dense: a panel for each table."""
    shares = ["kept_share", "peak_share"] if "kept_share" in frames[0] else ["ratio"]
    heights = [len(shares) * len(frame) + 4 for frame in frames]
    figure.set_size_inches(9, 0.22 * sum(heights))
    grid = figure.subplots(len(frames), 1, squeeze=False, height_ratios=heights)
    for axis, frame in zip(grid[:, 0], frames, strict=True):
        words = frame.assign(form=frame.get("form", ""), tokens=frame.tokens.astype(str))
        names = words[["case", "tokens", "structure", "scope", "permutation", "form"]].agg(
            " ".join, 1
        )
        bars = frame.set_index(names)[shares]
        bars.plot.barh(ax=axis, color=[BLUE, ORANGE], width=0.75, legend=len(shares) > 1)
        for bar in axis.containers:
            axis.bar_label(bar, fmt=" %.2f", fontsize=7.5)
        axis.invert_yaxis()
        axis.axvline(1, color=INK, lw=1)
        axis.set(xlabel="beside dense", title=f"{frame.device[0]}, {frame['dtype'][0]}")
