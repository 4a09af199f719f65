"""From rows to CSV files, a README of two screens, and a figure for each suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from padst_exp.engine.plots import STYLE

SUITES = {
    "layers": "Single layers",
    "model_inference": "Inference of whole models",
    "model_train": "Training steps of whole models",
    "memory": "Memory of a training step",
}
MARK = "<!-- What follows is made. -->\n"
# Budgets round to whole units, so that densities of other shapes differ a little.
NEAR = 0.15
WHERE = (
    "{device} {instructions}, {dtype}, {threads} thread(s), {clock} time, torch {torch}, "
    "triton {triton}, commit {commit}, dirty={dirty}"
)
LookUp = Callable[[str, float, str], str]


def write(path: Path, rows: Iterable[Mapping[str, Any]], **columns: object) -> None:
    """Write rows, all with the same `columns` added, as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).assign(**columns).to_csv(path, index=False)


def publish(folder: Path, tables: Path) -> list[Path]:
    """Write README.md, from its mark on, and a figure for each suite, from the CSV files there.

    `tables` is the folder of accuracies, results/tables; it need not exist.
    """
    readme, reached, written = folder / "README.md", accuracies(tables), []
    old = readme.read_text() if readme.exists() else ""
    text = [old.partition(MARK)[0] + MARK]
    for suite, title in SUITES.items():
        frames = {path.name: read(path) for path in sorted(folder.glob(f"{suite}-*.csv"))}
        if not frames:
            continue
        written.append(folder / f"{suite}.png")
        _draw({name: _best(frame) for name, frame in frames.items()}, written[-1])
        text.append(f"## {title}\n\n![{title}]({suite}.png)\n")
        for name, frame in frames.items():
            text.append(f"[{name}]({name}): {WHERE.format(**frame.iloc[0])}.\n")
            text += [_summary(frame, reached), *_slower(frame)]
    readme.write_text("\n".join(text).rstrip() + "\n")
    return [*written, readme]


def read(path: Path) -> pd.DataFrame:
    """A table with what all suites have in common: ratios, and names for rows and columns.

    Kernels of one structure share its name.
    """
    frame = pd.read_csv(path, keep_default_na=False)
    if "kept_share" in frame:
        ratios = {"ratio": 1 / frame.kept_share, "ratio_strongest": 1 / frame.peak_share}
        frame = frame.assign(**ratios, form="", dispatcher="", **{"pass": "kept / peak"})
    for name in ("ratio", "ratio_strongest", "p50_ms", "floor_share"):
        frame[name] = pd.to_numeric(frame.get(name, np.nan), errors="coerce")
    ours = (frame.structure != "dense") & ~frame.form.str.startswith(("torch", "masked"))
    form, scope = frame.form.where(~ours, ""), frame.scope.where(frame.scope != "all", "")
    soft = frame.permutation.where(frame.permutation == "soft", "")
    names = [
        ", ".join(filter(None, row)) for row in zip(frame.structure, form, scope, soft, strict=True)
    ]
    # Layers of one table are summed up, models stand side by side.
    case = frame["case"].where(frame.suite != "layers", "")
    cell = case + " " + frame["pass"] + " " + frame.tokens.astype(str)
    return frame.assign(ours=ours, name=names, cell=cell.str.strip())


def _final(frame: pd.DataFrame) -> pd.DataFrame:
    """Timed rows, of ours those with the permutations that training has."""
    permuted = frame.structure.isin(frame.structure[frame.permutation == "hard"])
    return frame[frame.ratio.notna() & ~(frame.ours & permuted & (frame.permutation == "none"))]


def _best(frame: pd.DataFrame) -> pd.DataFrame:
    """The fastest row by name, case and cell, at the first density."""
    densities = frame.density_asked[frame.density_asked < 1]
    own = _final(frame[frame.density_asked.isin([densities.iloc[0], 1.0])])
    best = own.sort_values("ratio", ascending=False).drop_duplicates(["name", "case", "cell"])
    # In the order of their first rows.
    order = [list(frame.name.unique()).index(name) for name in best.name]
    return best.assign(order=order).sort_values(["order", "pass", "tokens"])


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


def span(values: pd.Series[Any]) -> str:
    """Lowest to highest in three digits."""
    ends = dict.fromkeys(f"{end:.3g}" for end in (values.min(), values.max()))
    return " to ".join(ends) if values.notna().any() else ""


def _summary(frame: pd.DataFrame, reached: LookUp) -> str:
    """A line for each contender, a column for each cell: from the slowest to the fastest."""
    best, lines = _best(frame), []
    # Of single layers the figure shows the dense ones.
    best = best[(best.suite != "layers") | (best.structure != "dense")]
    cells = list(best.cell.unique())
    converted = frame[
        (frame["pass"] == "conversion") & frame.density_asked.isin(best.density_asked)
    ]
    steps = list(converted.form.unique())
    for name, rows in best.groupby("name", sort=False):
        first, line = rows.iloc[0], [name]
        for cell in cells:
            own = rows[rows.cell == cell]
            both = dict.fromkeys((span(own.ratio), span(own.ratio_strongest)))
            alone = len(own) == 1 and own.p50_ms.notna().all()
            time = (
                f" ({own.p50_ms.iloc[0]:,.{0 if own.p50_ms.iloc[0] > 1e3 else 3}f} ms)"
                if alone
                else ""
            )
            line.append(" / ".join(filter(None, both)) + time)
        made = converted[(converted.structure == first.structure) & first.ours]
        line += [span(rows.floor_share), *(span(made.p50_ms[made.form == step]) for step in steps)]
        known = reached(first.structure, first.density_asked, first.scope) if first.ours else ""
        lines.append([*line, ", ".join(set(filter(None, rows.dispatcher))), known])
    head = [f"density {best.density_asked.min():g}", *cells, "floor / time"]
    head += [*(f"{step}, ms" for step in steps), "products by", "accuracy"]
    keys = ["case", "cell", "structure", "form", "density_asked"]
    both = frame[frame.ours].pivot_table(index=keys, columns="permutation", values="p50_ms")
    if not {"hard", "none"} <= set(both):
        return markdown(head, lines)
    cost = (both.hard / both.none).median() - 1
    return f"{markdown(head, lines)}\nFolding a permutation in costs {cost:+.1%} (median).\n"


def _slower(frame: pd.DataFrame) -> list[str]:
    """Where layers and models of ours are slower than dense, at all densities."""
    lines = []
    for name, rows in _final(frame[frame.ours]).groupby("name", sort=False):
        slow = rows[rows.ratio < 1]
        found = [", ".join(map(str, slow[column].unique())) for column in ("density_asked", "cell")]
        if len(slow):
            lines.append([name, f"{len(slow)} of {len(rows)}", span(slow.ratio), *found])
    head = ["slower than dense", "rows", "ratio", "densities", "where"]
    return [markdown(head, lines)] if lines else []


def _draw(bests: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Times as fast as dense (or as small), the median over layers: a panel for each table."""
    panels = {name: best.pivot_table(index="name", columns="cell", values="ratio", aggfunc="median",
                                     sort=False) for name, best in bests.items()}  # fmt: skip
    rows, columns = sum(map(len, panels.values())), max(len(p.columns) for p in panels.values())
    with rc_context({**STYLE, "axes.grid": False}):
        size = 3 + 1.1 * columns, 0.26 * rows + 1.4 * len(panels)
        figure = Figure(figsize=size, layout="constrained")
        heights = [len(panel) for panel in panels.values()]
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axis, (name, panel) in zip(grid[:, 0], panels.items(), strict=True):
            axis.imshow(np.log2(panel), cmap="RdBu", vmin=-4, vmax=4, aspect="auto")
            for (row, column), value in np.ndenumerate(panel):
                if value == value:
                    color = "white" if abs(np.log2(value)) > 2.5 else "black"
                    axis.text(column, row, f"{value:.3g}", ha="center", va="center", color=color)
            axis.set_xticks(range(len(panel.columns)), panel.columns.str.wrap(16))
            axis.set_yticks(range(len(panel)), panel.index)
            axis.set_title(name.removesuffix(".csv"))
        figure.savefig(path)
