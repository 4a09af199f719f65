"""Tables of arms as text: the cells that every format shares, Markdown, and LaTeX."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from padst_exp.report.compare import Arm, Contrast, Table
from padst_exp.report.statistics import Difference, Interval, Sample
from padst_exp.report.store import Row, params

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
SCALES = {
    "demo": "demo scale (small models on small data, minutes on a CPU; not the papers' numbers)",
    "small": "small scale (an hour on one GPU a run; not the papers' numbers)",
    "paper": "paper scale",
    "unknown": "scale not recorded (not the papers' numbers)",
}


METRICS = {
    "top1": "top-1 accuracy (%)",
    "ema_top1": "top-1 accuracy of averaged weights (%)",
    "ema_perplexity": "perplexity of averaged weights",
}


@dataclass(frozen=True)
class Column:
    """A column: its heading, and whether its cells are numbers."""

    heading: str
    numeric: bool


@dataclass(frozen=True)
class Grid:
    """A table that is ready to be written in any format; nothing in it is escaped yet.

    Args:
        caption: names experiment, scale, model and data.
        columns: of the cells.
        cells: a list for each line.
        notes: what a reader has to know, in sentences.
        commands: that make the numbers again.
    """

    caption: str
    columns: tuple[Column, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def grid(table: Table) -> Grid:
    """The cells of a table of arms, without columns in which nothing stands."""
    varying = table.varying
    rows = [_cells(arm, varying) for arm in table.arms]
    caption = f"{table.experiment}: {_caption(table)}"
    return _filled(caption, rows, notes=_notes(table), commands=_commands(table))


def contrasts(table: Table) -> Grid | None:
    """The cells of the contrasts of a table, None where it has none."""
    if not table.contrasts:
        return None
    varying = table.varying
    rows = [_contrast_cells(one, varying) for one in table.contrasts]
    caption = f"{table.experiment}, contrasts: {_caption(table)}"
    return _filled(caption, rows, notes=_contrast_notes(table))


def grids(tables: Sequence[Table]) -> list[Grid]:
    """Each table of an experiment, and below it its contrasts."""
    both = [each for table in tables for each in (grid(table), contrasts(table))]
    return [each for each in both if each is not None]


def _filled(
    caption: str,
    rows: Sequence[dict[str, str]],
    *,
    notes: Iterable[str],
    commands: Iterable[str] = (),
) -> Grid:
    """A grid of rows by heading, without columns in which nothing stands."""
    used = [heading for heading in rows[0] if any(row[heading] for row in rows)]
    return Grid(
        caption=caption,
        columns=tuple(Column(heading, heading not in _TEXT) for heading in used),
        cells=tuple(tuple(row[heading] for heading in used) for row in rows),
        notes=tuple(notes),
        commands=tuple(commands),
    )


def _caption(table: Table) -> str:
    """Metric, model, data, what is swept and the same in all arms, and scale."""
    better = "lower is better" if table.lower_is_better else "higher is better"
    what = f"{metric_name(table.metric)}, {better}" if table.metric else "no result yet"
    varying, first = table.varying, table.arms[0].swept
    same = {key: value for key, value in first.items() if key not in varying}
    held = ", ".join(f"{key}={value}" for key, value in same.items())
    data = f"{table.model or 'model unknown'} on {table.dataset or 'unknown data'}"
    return "; ".join(filter(None, [what, data, held, SCALES[table.scale]]))


def metric_name(metric: str) -> str:
    """What a metric is called in tables and plots."""
    return METRICS.get(metric, metric)


def markdown(grid: Grid) -> str:
    """A grid in Markdown."""
    rows = [[_plain(column.heading) for column in grid.columns]]
    rows.append(["---:" if column.numeric else "---" for column in grid.columns])
    rows += [[_plain(cell) for cell in row] for row in grid.cells]
    lines = [f"**{_plain(grid.caption)}**", ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {_plain(note)}" for note in grid.notes)]
    if grid.commands:
        lines += ["", "~~~", *grid.commands, "~~~"]
    return "\n".join(lines) + "\n"


def latex(grid: Grid) -> str:
    """A grid as a LaTeX table; it needs the package booktabs."""
    form = "".join("r" if column.numeric else "l" for column in grid.columns)
    body = [" & ".join(_tex(cell) for cell in row) + r" \\" for row in grid.cells]
    head = " & ".join(_tex(column.heading) for column in grid.columns) + r" \\"
    notes = [_tex(note) for note in grid.notes]
    commands = [rf"\texttt{{{_tex(command)}}}" for command in grid.commands]
    return "\n".join([
        r"\begin{table}",
        rf"\caption{{{_tex(grid.caption)}}}",
        rf"\begin{{tabular}}{{{form}}}",
        r"\toprule", head, r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\smallskip\footnotesize {line}" for line in (*notes, *commands)),
        r"\end{table}", "",
    ])  # fmt: skip


_TEXT = frozenset({"arm", "contrast", "swept", "against", "published", "runs"})


def _cells(arm: Arm, varying: Sequence[str]) -> dict[str, str]:
    sample, found = arm.sample, arm.closure
    density = [row["density"] for row in arm.rows if row["density"] is not None]
    gone = [f"{arm.not_finite} not finite"] * bool(arm.not_finite)
    gone += [f"{arm.missing} not finished"] * bool(arm.missing)
    return {
        "arm": arm.name,
        "swept": arm.words(varying),
        "density": f"{sum(density) / len(density):.4f}" if density else "",
        "mean": value(sample.mean) if sample else "",
        "sd": value(sample.sd) if sample and sample.sd is not None else "",
        "seeds": str(sample.n) if sample else "0",
        "95% interval": span(sample.interval) if sample else "",
        "against": arm.baseline,
        **_difference_cells(arm.difference, arm.p),
        "gap closed": value(found.value) if found else "",
        "gap's interval": span(found.interval) if found else "",
        "published": "; ".join(f"{row.value:g} ({row.source})" for row in arm.papers),
        "ours less published": "; ".join(
            _signed(sample.mean - row.value) for row in arm.papers
        ) if sample and arm.comparable else "",
        "runs": ", ".join(gone),
    }  # fmt: skip


def pair_name(contrast: Contrast) -> str:
    """Both arms of a contrast, as a difference."""
    return f"{contrast.ours} {MINUS} {contrast.theirs}"


def with_interval(sample: Sample | None) -> str:
    """A difference and its interval in one cell; empty for none."""
    if sample is None:
        return ""
    interval = span(sample.interval)
    return f"{_signed(sample.mean)} ({interval})" if interval else _signed(sample.mean)


def _contrast_cells(contrast: Contrast, varying: Sequence[str]) -> dict[str, str]:
    return {
        "contrast": pair_name(contrast),
        "swept": contrast.words(varying),
        "seeds": str(contrast.difference.sample.n),
        **_difference_cells(contrast.difference, contrast.p),
    }


def _difference_cells(difference: Difference | None, p: float | None) -> dict[str, str]:
    return {
        "difference": _signed(difference.sample.mean) if difference else "",
        "its 95% interval": span(difference.sample.interval) if difference else "",
        "bootstrap": span(difference.bootstrap) if difference else "",
        "with items": span(difference.over_items) if difference else "",
        "p (Holm)": _p(p),
        "detectable": value(difference.detectable) if difference else "",
    }


def _contrast_notes(table: Table) -> Iterator[str]:
    comparisons = sum(contrast.p is not None for contrast in table.contrasts)
    if comparisons:
        yield (
            "A family of its own, listed in the experiment: "
            f"p values are adjusted for its {comparisons} comparisons."
        )


def _notes(table: Table) -> Iterator[str]:
    rows = [row for arm in table.arms for row in arm.rows if row["value"] is not None]
    if not rows:
        return
    yield "The seed is the replicate; mean of final values, t interval of the mean."
    if table.comparisons:
        yield (
            "Differences are paired by seed, with a paired t interval and a bootstrap over seeds "
            "(with items: over seeds and the images or texts that they were tested on); "
            f"p values are adjusted for all {table.comparisons} comparisons of this table. "
            "Detectable: what so many pairs would find with a power of 80% at 5%, unadjusted."
        )
    if any(arm.closure for arm in table.arms):
        yield (
            f"Gap closed: (arm {MINUS} random) / (RigL {MINUS} random), Fieller's interval; blank "
            "where the interval of the gap itself includes zero, or RigL is the worse one."
        )
    papers = [row for arm in table.arms for row in arm.papers]
    if papers and not any(arm.comparable for arm in table.arms):
        data = ", ".join(dict.fromkeys(f"{row.model} on {row.dataset}" for row in papers))
        yield f"Published numbers are of {data}: other sizes or data, so no difference is given."
    yield from dict.fromkeys(f"{row.paper}, {row.table}: {row.note}" for row in papers if row.note)
    devices = dict.fromkeys(str(row["device_name"] or row["device"]) for row in rows)
    commits = dict.fromkeys(str(row["commit"])[:10] or "unknown" for row in rows)
    dirty = any(str(row["dirty"]) != "False" for row in rows)
    torches = dict.fromkeys(str(row["torch"]) for row in rows)
    yield (
        f"Runs on {', '.join(devices)}, torch {', '.join(torches)}, "
        f"commit {', '.join(commits)}{', with uncommitted changes' if dirty else ''}."
    )


def _commands(table: Table) -> Iterator[str]:
    """What makes these runs, and this table, again."""
    cells: dict[tuple[str, ...], list[Arm]] = defaultdict(list)
    for arm in table.arms:
        cells[arm.name if table.scale == "unknown" else "", arm.words(table.varying)].append(arm)
    seeds: dict[str, set[int]] = defaultdict(set)
    for arms in cells.values():
        rows = [row for arm in arms for row in arm.rows]
        seeds[shlex.join(_in_common(rows))].update(row["seed"] for row in rows)
    for overrides, own in seeds.items():
        sweep = "" if table.scale == "unknown" else f"experiment={table.experiment} "
        scale = f"scale={table.scale} " if sweep else ""
        more = f"{overrides} " if overrides else ""
        listed = ",".join(map(str, sorted(own)))
        yield f"python -m padst_exp.train -m {sweep}{scale}{more}seed={listed}"
    yield f"python -m padst_exp.report experiments=[{table.experiment}]"


def _in_common(rows: Sequence[Row]) -> list[str]:
    """The overrides that all of these runs had beside those of their experiment."""
    known = {"experiment", "scale", "arm", "seed", *params(rows[0]["experiment"])}
    if rows[0]["scale"] == "unknown":
        known = {"seed"}
    words = []
    for row in rows:
        try:
            words.append(shlex.split(str(row["overrides"])))
        except ValueError:
            words.append([])
    shared = set(words[0]).intersection(*words[1:])
    return [
        word for word in words[0]
        if word in shared and word.lstrip("+~").partition("=")[0] not in known
    ]  # fmt: skip


def value(number: float | None) -> str:
    """A number in two digits."""
    if number is None:
        return ""
    return f"{number:.2f}".replace("-", MINUS)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", MINUS)


def span(interval: Interval | None) -> str:
    """An interval in words."""
    return "" if interval is None else f"{value(interval[0])} to {value(interval[1])}"


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _plain(text: str) -> str:
    """Text that Markdown, and what renders it as HTML, leaves as it is."""
    for sign in "\\`*_|[]<>#":
        text = text.replace(sign, f"\\{sign}" if sign not in "<>" else f"&{_ENTITIES[sign]};")
    return text


_ENTITIES = {"<": "lt", ">": "gt"}
_SIGNS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", MINUS: "$-$", TIMES: r"$\times$",
}  # fmt: skip


def _tex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_SIGNS.get(sign, sign) for sign in text)


def document(grids: Sequence[Grid], format: str) -> str:
    """All tables of an experiment in one text, "markdown" or "latex"."""
    write = {"markdown": markdown, "latex": latex}[format]
    return "\n".join(write(grid) for grid in grids)
