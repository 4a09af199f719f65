"""From rows to CSV files, a README of two screens, and a figure for each of its tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from padst_exp.config import config_dir
from padst_exp.engine.plots import STYLE

MARK = "<!-- What follows is made. -->\n"
# Budgets round to whole units, so that densities of other shapes differ a little.
NEAR = 0.15
WHERE = (
    "{device} {instructions}, {dtype}, {threads} thread(s), {clock} time, torch {torch}, "
    "triton {triton}, commit {commit}, dirty={dirty}"
)


def write(path: Path, rows: Iterable[Mapping[str, Any]] | pd.DataFrame, **columns: object) -> None:
    """Write rows, all with the same `columns` added, as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    frame.assign(**columns).to_csv(path, index=False)


def publish(folder: Path, tables: Path) -> list[Path]:
    """Write README.md, from its mark on, and a figure for each table, from the CSV files there.

    `tables` is the folder of accuracies, results/tables; it need not exist.
    """
    readme, written = folder / "README.md", []
    old = readme.read_text() if readme.exists() else ""
    text = [old.partition(MARK)[0] + MARK]
    suites: dict[str, list[str]] = defaultdict(list)
    for suite, keys in OmegaConf.load(config_dir() / "bench.yaml").suites.items():
        suites[keys.table].append(suite)
    for title, names in suites.items():
        # Files by where they were measured: what follows the suite in their names.
        files: dict[str, list[Path]] = defaultdict(list)
        for suite in names:
            for path in sorted(folder.glob(f"{suite}-*.csv")):
                files[path.stem.removeprefix(f"{suite}-")].append(path)
        if not files:
            continue
        frames = {
            where: pd.concat(map(read, paths), ignore_index=True) for where, paths in files.items()
        }
        written.append(folder / f"{names[0]}.png")
        draw(frames, written[-1])
        text.append(f"## {title}\n![{title}]({written[-1].name})")
        for where, frame in frames.items():
            for path in files[where]:
                row = pd.read_csv(path, keep_default_na=False).iloc[0]
                text.append(f"- [{path.name}]({path.name}): {WHERE.format(**row)}")
            text += [folding(frame), summary(frame, tables)]
    readme.write_text("\n".join(text).rstrip() + "\n")
    return [*written, readme]


def read(path: Path) -> pd.DataFrame:
    """A table with what all suites have in common: ratios, and names for rows and columns.

    Kernels of one structure share its name. `final` are timed rows of dense ones and peers, and of
    ours those with the permutations that training has.
    """
    frame = pd.read_csv(path, keep_default_na=False)
    if "kept_share" in frame:
        ratios = {"ratio": 1 / frame.kept_share, "ratio_strongest": 1 / frame.peak_share}
        form = frame.structure.map({"dense": "eager"}).fillna("")
        frame = frame.assign(**ratios, form=form, **{"pass": "kept / peak"})
    for name in ("ratio", "ratio_strongest", "p50_ms", "floor_share"):
        frame[name] = pd.to_numeric(frame.get(name, np.nan), errors="coerce")
    peers = frame.form.str.startswith(("torch", "masked"))
    ours = (frame.structure != "dense") & ~peers
    parts = {"structure": frame.structure.where(~peers, ""), "form": frame.form.where(~ours, ""),
             "scope": frame.scope.where(frame.scope != "all", ""),
             "permutation": frame.permutation.where(frame.permutation == "soft", "")}  # fmt: skip
    name = pd.DataFrame(parts).apply(lambda row: ", ".join(filter(None, row)), axis=1)
    hard = frame.structure.isin(frame.structure[frame.permutation == "hard"])
    final = frame.ratio.notna() & ~(ours & hard & (frame.permutation == "none"))
    # Layers are summed up, models stand side by side.
    case = "" if (frame.tokens == 0).any() else frame["case"].str.partition(",")[0] + ", "
    cell = case + frame["pass"] + " " + frame.tokens.astype(str)
    return frame.assign(ours=ours, name=name, cell=cell, final=final)


def fastest(frame: pd.DataFrame) -> pd.DataFrame:
    """The fastest final row by name, case and cell, at the first density."""
    density = frame.density_asked[frame.density_asked < 1].iloc[0]
    own = frame[frame.final & frame.density_asked.isin([density, 1.0])]
    best = own.loc[own.groupby(["name", "case", "cell"], sort=False).ratio.idxmax()]
    return best.sort_values("tokens", kind="stable").sort_values("pass", kind="stable")


def summary(frame: pd.DataFrame, tables: Path) -> str:
    """A line for each contender, with a column for each cell: from the slowest to the fastest."""
    best, layers = fastest(frame), (frame.tokens == 0).any()
    density = best.density_asked.min()
    groups = best.assign(seconds=best.p50_ms / 1e3).groupby(["name", "cell"], sort=False)
    usual, strongest, seconds = (
        groups[column].agg(span) for column in ("ratio", "ratio_strongest", "seconds")
    )
    cells = usual.where(usual == strongest, usual + " / " + strongest)
    if not layers:
        cells += (" (" + seconds + " s)").where(seconds != "", "")
    table = cells.unstack().reindex(frame.name.unique()).dropna(how="all")
    table = table[list(best.cell.unique())]
    ours = frame[frame.ours & frame.final].groupby("name")
    slower = ours.ratio.agg(lambda ratios: f"{(ratios < 1).sum()} of {len(ratios)}")
    table["slower than dense"] = slower.where(~slower.str.startswith("0 "), "0")
    if layers:
        table = table[~table.index.str.startswith("dense")]  # the figure has them
        table["floor / time"] = best.groupby("name").floor_share.agg(span)
        made = frame[(frame["pass"] == "conversion") & (frame.density_asked == density)]
        for form, rows in made.groupby("form", sort=False):
            table[f"{form}, ms"] = rows.groupby("structure").p50_ms.agg(span)
        table = table.join(accuracies(tables, density))
    return markdown(table.rename_axis(f"density {density:g}").reset_index().fillna(""))


def folding(frame: pd.DataFrame) -> str:
    """What a hard permutation costs, in one line."""
    keys = ["case", "cell", "structure", "form", "density_asked"]
    both = frame[frame.ours].pivot_table(index=keys, columns="permutation", values="p50_ms")
    both = both.reindex(columns=["hard", "none"]).dropna()
    cost = (both.hard / both.none).median() - 1
    return "" if both.empty else f"- Folding a permutation in costs {cost:+.1%} (median).\n"


def span(values: pd.Series[Any]) -> str:
    """Lowest to highest in three digits."""
    ends = dict.fromkeys(f"{end:.3g}" for end in (values.min(), values.max()))
    return " to ".join(ends) if values.notna().any() else ""


def accuracies(tables: Path, density: float) -> pd.DataFrame:
    """What demo models reached, by structure and data set; mean of all seeds."""
    wanted = ["structure", "dataset", "seed", "density", "value"]
    paths = [tables / f"{name}_accuracy.csv" for name in ("demo", "structure")]
    frames = [pd.read_csv(path)[wanted] for path in paths if path.exists()]
    frame = pd.concat([pd.DataFrame(columns=wanted), *frames]).dropna()
    near = frame[(frame.density.astype(float) - density).abs() <= NEAR * density]
    # A run can stand in more than one table.
    runs = near.drop_duplicates(["structure", "dataset", "seed"])
    means = runs.astype({"value": float}).groupby(["structure", "dataset"]).value.mean()
    return means.map("{:.1f}".format).unstack()


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows) + "\n"


def draw(frames: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Times as fast as dense (or as small), the median over layers: a panel for each table."""
    panels = {name: fastest(frame).pivot_table(index="name", columns="cell", values="ratio",
              aggfunc="median", sort=False) for name, frame in frames.items()}  # fmt: skip
    rows, columns = sum(map(len, panels.values())), max(len(p.columns) for p in panels.values())
    with rc_context({**STYLE, "axes.grid": False}):
        size = 3 + 1.1 * columns, 0.26 * rows + 1.4 * len(panels)
        figure = Figure(figsize=size, layout="constrained")
        heights = [len(panel) for panel in panels.values()]
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axis, (name, panel) in zip(grid[:, 0], panels.items(), strict=True):
            axis.imshow(np.log2(panel), cmap="RdBu", vmin=-4, vmax=4, aspect="auto")
            for (row, column), value in np.ndenumerate(panel):
                color = "white" if abs(np.log2(value)) > 2.5 else "black"
                known = "" if np.isnan(value) else f"{value:.3g}"
                axis.text(column, row, known, ha="center", va="center", color=color)
            axis.set_xticks(range(len(panel.columns)), panel.columns.str.wrap(16))
            axis.set_yticks(range(len(panel)), panel.index)
            axis.set_title(name.removesuffix(".csv"))
        figure.savefig(path)
