"""From rows to CSV files, a README of two screens, and a figure for each suite."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from padst_exp.engine.plots import BLUE, GREEN, GREY, INK, ORANGE, STYLE

SUITES = {
    "layers": "Single layers",
    "model_inference": "Inference of whole models",
    "model_train": "Training steps of whole models",
    "memory": "Memory of a training step",
}
INTRODUCTION = """# Sparse layers and models beside dense ones

Made from the CSV files beside it by `python -m padst_exp.bench suite=...`, which hold every
contender, density, quartile and version; nothing is typed in.

- All contenders of a table take turns in one process, after a warm-up. A ratio is dense time over
  sparse time, the median over rounds of neighbouring timings. **Above 1 the sparse side is faster;
  what is slower than dense is listed.**
- `a / b`: a is against the faster of eager and compiled PyTorch, b against the fastest dense
  contender. On CPUs that is oneDNN called directly: PyTorch multiplies single precision by MKL,
  which leaves half of an AMD core unused. One number where both are the same.
- Weights rotate through more memory than the last-level cache holds, as inside a model. Hard
  permutations are folded in.
- The floor is a twin that reads and writes the same bytes and computes nothing, or the arithmetic at
  the rate of the fastest dense product, whichever takes longer; measured in the same run. The floor
  of a model is its arithmetic, attention included, or reading its weights.
- Accuracies are those of the small demo models in `../tables` at the same structure and density of
  all block linears (top-1 in %, perplexity), not of the model that is timed; `-`: none was trained.
"""
# Budgets round to whole units, so that densities of other shapes differ a little.
NEAR = 0.15


def write(path: Path, rows: Iterable[dict[str, Any]], **columns: object) -> None:
    """Write rows, all with the same `columns` added, as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).assign(**columns).to_csv(path, index=False)


def publish(folder: Path, tables: Path) -> list[Path]:
    """Write README.md and a figure for each suite, from all CSV files in `folder`.

    Args:
        folder: holds `<suite>-<device>-<dtype>.csv`.
        tables: folder of accuracies, results/tables; need not exist.
    """
    reached, text, written = accuracies(tables), [INTRODUCTION], []
    for suite, title in SUITES.items():
        paths = sorted(folder.glob(f"{suite}-*.csv"))
        if not paths:
            continue
        frames = [_read(path) for path in paths]
        written.append(_draw(suite, frames, folder / f"{suite}.png"))
        text.append(f"## {title}\n\n![{title}]({suite}.png)\n")
        for path, frame in zip(paths, frames, strict=True):
            text.append(f"[{path.name}]({path.name}): {_where(frame.iloc[0])}\n")
            section = _layers if suite == "layers" else _memory if suite == "memory" else _models
            text.append(section(frame, reached))
        if suite == "layers":
            text.append(_slower(frames))
    readme = folder / "README.md"
    readme.write_text("\n".join(text).rstrip() + "\n")
    return [*written, readme]


def _read(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, keep_default_na=False)
    numbers = [c for c in frame if c in ("ratio", "ratio_strongest", "p50_ms", "floor_share")]
    frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="coerce")
    return frame


def accuracies(tables: Path) -> Callable[[str, float, str], str]:
    """Looks up by structure, density and scope what demo models reached, in one line."""
    frames = [pd.read_csv(path) for path in sorted(tables.glob("*_accuracy.csv"))]
    wanted = ["dataset", "structure", "density", "seed", "value"]
    frame = (
        pd.concat([frame[wanted] for frame in frames]) if frames else pd.DataFrame(columns=wanted)
    )
    # A run can stand in more than one table.
    frame = frame.dropna().drop_duplicates(["dataset", "structure", "seed"])

    def look_up(structure: str, density: float, scope: str) -> str:
        near = (frame.density - density).abs() <= NEAR * density
        own = frame[near & (frame.structure == structure) & (scope == "all")]
        means = own.groupby("dataset")["value"].mean()
        return ", ".join(f"{name} {value:.1f}" for name, value in means.items()) or "-"

    return look_up


def _where(row: pd.Series[Any]) -> str:
    threads = f", {row.threads} thread(s) of {row.instructions}" if row.instructions else ""
    dirty = " with changes" if str(row.dirty) == "True" else ""
    reach = "; dense products reach {gemm_gflops} GFLOP/s, copies {copy_gb_per_s} GB/s"
    return (
        f"{row.device}{threads}, {row['dtype']}, torch {row.torch}, triton {row.triton}, "
        f"{row.clock} time, commit {row.commit}{dirty}"
        + (reach.format(**row) if "gemm_gflops" in row else "")
        + "."
    )


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

    Of the kernels of one structure the fastest counts, with the permutations that training has;
    peers have names of their own.
    """
    timed = frame[(frame.structure != "dense") & frame.ratio.notna()]
    permuted = timed.structure.isin(timed.structure[timed.permutation == "hard"])
    ours = timed.form.str.startswith(("packed", "exported"))
    timed = timed[~(ours & permuted & (timed.permutation == "none"))]
    name = timed.structure.where(ours, timed.structure + ", " + timed.form)
    state = timed.permutation.map({"soft": ", soft permutation"}).fillna("")
    return timed.assign(name=name + state, ours=ours)


def _first_density(frame: pd.DataFrame) -> float:
    return float(frame.density_asked[frame.density_asked < 1].iloc[0])


def _best(frame: pd.DataFrame) -> pd.DataFrame:
    """The fastest row by name, layer, tokens and pass, at the first density."""
    own = _named(frame[frame.density_asked == _first_density(frame)])
    best = own.sort_values("ratio", ascending=False)
    return best.drop_duplicates(["name", "case", "tokens", "pass"]).sort_index()


def _layers(frame: pd.DataFrame, reached: Callable[[str, float, str], str]) -> str:
    """A line for each structure and peer: from the slowest to the fastest layer."""
    best, density = _best(frame), _first_density(frame)
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
    head = [f"density {density:g}, tokens", *(f"{what} {tokens}" for what, tokens in cells),
            "floor / forward", "index, ms", "export, ms", "accuracy"]  # fmt: skip
    keys = ["case", "tokens", "pass", "structure", "form", "density_asked"]
    both = frame.pivot_table(index=keys, columns="permutation", values="p50_ms")
    cost = ""
    if {"hard", "none"} <= set(both):
        cost = f"\nA folded permutation costs {(both.hard / both.none).median() - 1:+.1%}.\n"
    return markdown(head, lines) + cost


def _slower(frames: Sequence[pd.DataFrame]) -> str:
    """Where our layers are slower than dense, and what the dispatcher trains them by there."""
    lines = []
    for frame in frames:
        own = _named(frame)
        for name, rows in own[own.ours].groupby("name", sort=False):
            slow = rows[rows.ratio < 1]
            columns = ("density_asked", "pass", "tokens", "dispatcher")
            found = [", ".join(map(str, sorted(slow[column].unique()))) for column in columns]
            count = f"{len(slow)} of {len(rows)}"
            lines += [[name, frame["dtype"].iloc[0], count, _span(slow.ratio), *found]] * len(
                slow[:1]
            )
    head = ["slower than dense", "dtype", "cells", "ratio", "densities", "passes", "tokens",
            "trained by"]  # fmt: skip
    return markdown(head, lines) if lines else ""


def _models(frame: pd.DataFrame, reached: Callable[[str, float, str], str]) -> str:
    """Every contender in its fastest form; dense ones in all forms."""
    dense = frame.structure == "dense"
    frame = frame.assign(one=frame.form.where(dense, ""), what=frame["pass"])
    keys = ["case", "tokens", "pass", "structure", "scope", "permutation", "one"]
    best = frame.sort_values("ratio", ascending=False).drop_duplicates(keys).sort_index()
    lines = []
    for row in best[best.ratio.notna()].itertuples():
        strongest = f" / {row.ratio_strongest:.2f}" if row.strongest_form != row.dense_form else ""
        name = f"{row.structure}, {row.form}" + (", soft" if row.permutation == "soft" else "")
        known = row.structure != "dense"
        accuracy = reached(row.structure, row.density_asked, row.scope) if known else ""
        lines.append([f"{row.case}, batch {row.tokens}: {row.what}", name, row.scope, row.density,
                      f"{row.p50_ms:.4g}", f"{row.ratio:.2f}{strongest}", row.floor_share,
                      row.dispatcher, accuracy])  # fmt: skip
    head = ["model", "contender", "sparse layers", "density", "ms", "dense / this",
            "floor / this", "products by", "accuracy"]  # fmt: skip
    return markdown(head, lines)


def _memory(frame: pd.DataFrame, _: object) -> str:
    sizes = [column for column in frame if column.endswith("_bytes")]
    shown = ["case", "tokens", "structure", "scope", "permutation", "density"]
    rows = frame[[*shown, *sizes, "kept_share", "peak_share"]]
    head = [*shown, *(f"{size.removesuffix('_bytes')}, MB" for size in sizes), "kept / dense",
            "peak / dense"]  # fmt: skip
    rows = rows.assign(**{size: (rows[size] / 1e6).round(1) for size in sizes})
    return markdown(head, rows.itertuples(index=False)).replace("tokens", "batch", 1)


COLORS = {"nm": BLUE, "block": ORANGE, "diag": GREEN, "unstructured": "#8b5fb0"}


def _draw(suite: str, frames: list[pd.DataFrame], path: Path) -> Path:
    draw = _draw_layers if suite == "layers" else _draw_bars
    with rc_context(STYLE):
        figure = Figure(layout="constrained")
        draw(figure, frames)
        figure.savefig(path)
    return path


def _draw_layers(figure: Figure, frames: Sequence[pd.DataFrame]) -> None:
    """Median speed-up of layers over tokens: a row for each table, a column for each pass."""
    bests = [_best(frame) for frame in frames]
    passes = list(bests[0]["pass"].unique())
    figure.set_size_inches(4.6 * len(passes) + 2, 3.6 * len(frames))
    grid = figure.subplots(len(frames), len(passes), squeeze=False, sharey=True)
    for (axes, best), what in itertools.product(zip(grid, bests, strict=True), passes):
        axis, rows = axes[passes.index(what)], best[best["pass"] == what]
        for name, own in rows.groupby("name", sort=False):
            _curve(axis, own.groupby("tokens").ratio.median(), str(name), bool(own.ours.all()))
        first = best.iloc[0]
        axis.set_title(f"{first.device}, {first['dtype']}, density {first.density_asked}: {what}")
        axis.axhline(1, color=INK, lw=1)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times as fast as dense")
        axis.set_yticks(
            [0.25, 0.5, 1, 2, 4, 8, 16], ["1/4x", "1/2x", "1x", "2x", "4x", "8x", "16x"]
        )
        ticks = sorted(rows.tokens.unique())
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
    lines = {line.get_label(): line for axis in grid.flat for line in axis.lines[:-1]}
    figure.legend(list(lines.values()), list(lines), loc="outside right center")


def _curve(axis: Axes, curve: pd.Series[Any], name: str, ours: bool) -> None:
    """Hue for the family, lighter from member to member; dashed where it is not ours."""
    family = name.partition(" ")[0].partition(",")[0]
    members = sum(str(line.get_label()).startswith(family) for line in axis.lines)
    axis.plot(curve.index, curve, "-" if ours else ":", marker="o", ms=3, label=name,
              color=COLORS.get(family, GREY), alpha=max(0.3, 1 - 0.18 * members))  # fmt: skip


def _draw_bars(figure: Figure, frames: Sequence[pd.DataFrame]) -> None:
    """Speed-ups of models, or shares of memory, beside dense: a panel for each table."""
    panels = [_bars(frame) for frame in frames]
    heights = [len(bars) * len(bars.columns) + 4 for bars in panels]
    figure.set_size_inches(9, 0.22 * sum(heights))
    grid = figure.subplots(len(frames), 1, squeeze=False, height_ratios=heights)
    for axis, bars in zip(grid[:, 0], panels, strict=True):
        bars.plot.barh(ax=axis, color=[BLUE, ORANGE], width=0.75, legend=len(bars.columns) > 1)
        for bar in axis.containers:
            axis.bar_label(bar, fmt=" %.2f", fontsize=7.5)
        axis.invert_yaxis()
        axis.axvline(1, color=INK, lw=1)
        axis.set(xlabel="beside dense", ylabel="", title=bars.attrs["title"])


def _bars(frame: pd.DataFrame) -> pd.DataFrame:
    columns = ["kept_share", "peak_share"] if "kept_share" in frame else ["ratio"]
    form = frame.get("form", "")
    scope = frame.scope.where(frame.scope != "all", "") + " "
    soft = frame.permutation.where(frame.permutation == "soft", "")
    names = frame["case"] + ", " + frame.tokens.astype(str) + ": " + frame.structure + " "
    bars = frame.set_index(names + scope + soft + " " + form)[columns].dropna()
    bars.attrs["title"] = f"{frame.device[0]}, {frame.dtype[0]}"
    return bars
