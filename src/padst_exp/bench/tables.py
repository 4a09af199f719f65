"""From rows to CSV files, a README of two screens, and a figure for each of its tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from padst_exp.atomic import replace_text, replacing
from padst_exp.config import config_dir
from padst_exp.engine.plots import STYLE
from padst_exp.files import read_text, reading

MARK = "<!-- What follows is made. -->\n"
A_TABLE = "a table that bench wrote"
# Budgets round to whole units, so that densities of other shapes differ a little.
NEAR = 0.15
WHERE = (
    "{device} {instructions}, {dtype}, {threads} thread(s), {clock} time, torch {torch}, "
    "triton {triton}, commit {commit}, dirty={dirty}"
)


def write(path: Path, rows: Iterable[Mapping[str, Any]] | pd.DataFrame, **columns: object) -> None:
    """Write rows, all with the same `columns` added, as a CSV file."""
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    replace_text(path, frame.assign(**columns).to_csv(index=False))


def publish(folder: Path, tables: Path) -> list[Path]:
    """Write README.md, from its mark on, and a figure for each table, from the CSV files there.

    `tables` is the folder of accuracies, results/tables; it need not exist.

    Raises:
        UserError: one of them is damaged. Nothing is written then.
    """
    readme, written = folder / "README.md", []
    text = [introduction(readme) + MARK]
    found = sections(folder, tables)
    for section in found:
        text.append(f"## {section.title}\n![{section.title}]({section.picture})")
        text += section.text
    for section in found:
        written.append(folder / section.picture)
        with replacing(written[-1]) as file:
            section.figure.savefig(file, format="png")
    replace_text(readme, "\n".join(text).rstrip() + "\n")
    return [*written, readme]


def introduction(readme: Path) -> str:
    """What stands before the mark; nothing where there is no such file."""
    if not readme.exists():
        return ""
    return read_text("out", readme, "a text").partition(MARK)[0]


@dataclass(frozen=True)
class Section:
    """A table of the README, of one or several suites.

    Args:
        title: of the section.
        picture: name of the file of its figure.
        figure: ratios of all its files.
        text: what follows the figure.
    """

    title: str
    picture: str
    figure: Figure
    text: list[str]


def sections(folder: Path, tables: Path, *, without: Path | None = None) -> list[Section]:
    """Everything that the CSV files of a folder show, except for one of them.

    Raises:
        UserError: names the one that is damaged.
    """
    suites: dict[str, list[str]] = defaultdict(list)
    for suite, keys in OmegaConf.load(config_dir() / "bench.yaml").suites.items():
        suites[keys.table].append(suite)
    found = []
    for title, names in suites.items():
        # Files by where they were measured: what follows the suite in their names.
        files: dict[str, list[Path]] = defaultdict(list)
        for suite in names:
            for path in sorted({*folder.glob(f"{suite}-*.csv")} - {without}):
                files[path.stem.removeprefix(f"{suite}-")].append(path)
        if not files:
            continue
        frames = {
            where: pd.concat(map(read, paths), ignore_index=True) for where, paths in files.items()
        }
        text = []
        for where, frame in frames.items():
            for path in files[where]:
                with reading("out", path, A_TABLE):
                    row = pd.read_csv(path, keep_default_na=False).iloc[0]
                    text.append(f"- [{path.name}]({path.name}): {WHERE.format(**row)}")
            with reading("out", " and ".join(map(str, files[where])), "tables that bench wrote"):
                text += [folding(frame), summary(frame, tables)]
        with reading("out", folder, "tables that bench wrote"):
            figure = draw(frames)
        found.append(Section(title, f"{names[0]}.png", figure, text))
    return found


def read(path: Path) -> pd.DataFrame:
    """As `columns_of`, of a file.

    Raises:
        UserError: it is damaged.
    """
    with reading("out", path, A_TABLE):
        return columns_of(pd.read_csv(path, keep_default_na=False))


def columns_of(frame: pd.DataFrame) -> pd.DataFrame:
    """A table with what all suites have in common: ratios, and names for rows and columns.

    Kernels of one structure share its name. `final` are timed rows of dense ones and peers, and of
    ours those with the permutations that training has.
    """
    frame = frame.astype({"tokens": "int64", "density_asked": float, "permutation": str})
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
    frames = []
    for path in (tables / f"{name}_accuracy.csv" for name in ("demo", "structure")):
        if path.exists():
            with reading("out", path, "a table of accuracies"):
                frames.append(pd.read_csv(path)[wanted])
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


def draw(frames: Mapping[str, pd.DataFrame]) -> Figure:
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
    return figure
