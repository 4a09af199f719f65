"""What the page shows: figures, each with the table of what is drawn beside it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from padst_exp.errors import UserError
from padst_exp.messages import say
from padst_exp.report import figures, store
from padst_exp.report.choices import structure_of
from padst_exp.report.compare import Arm, Table
from padst_exp.report.figures import Look, Series
from padst_exp.report.pictures import picture
from padst_exp.report.runs import Run, number
from padst_exp.report.speeds import Measured, Speed
from padst_exp.report.statistics import Sample
from padst_exp.report.store import Row, learned
from padst_exp.report.tables import (
    Column,
    Grid,
    metric_name,
    pair_name,
    span,
    value,
    with_interval,
)

MOST_CURVES, MOST_PICTURES, FEWEST_POINTS = 8, 6, 3
BITMAP = Markup(
    '<figure class="bitmap"><img alt="{}" src="{}"><figcaption>{}</figcaption></figure>'
)
Legend = tuple[tuple[Markup, str], ...]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Exhibit:
    """A figure with its table beside it.

    Args:
        title: above both.
        figure: SVG or HTML in which everything from outside is escaped.
        grid: the numbers that are drawn.
        legend: swatches with what they stand for.
    """

    title: str
    figure: Markup
    grid: Grid
    legend: Legend = ()


def key(tables: Sequence[Table]) -> Legend:
    """What colours, marks and fills mean, of all that was run."""
    arms = [arm for table in tables for arm in table.arms if arm.sample]
    structures = {structure_of(arm.first["structure"]) for arm in arms}
    permutations = {arm.permutation for arm in arms}
    names = {"none": "no permutation", "random": "random", "learned": "learned"}
    looks = [(Look(name, "learned"), False, name) for name in figures.MARKS if name in structures]
    looks += [(Look("dense", k), True, name) for k, name in names.items() if k in permutations]
    return tuple((_swatch(look, line=line), name) for look, line, name in looks)


def results(table: Table) -> Exhibit | None:
    """Means against what is swept if that is one number, else a line for each arm."""
    arms = [arm for arm in table.arms if arm.sample]
    if not arms:
        return None
    metric = metric_name(table.metric)
    title = f"{metric}, {table.model} on {table.dataset}, {table.scale} scale"
    curves = _curves(table, arms)
    if curves is None:
        arms = _once(arms)
        names = [_label(arm, table) for arm in arms]
        lines = [_series(name, [arm], [0.0]) for name, arm in zip(names, arms, strict=True)]
        cells = tuple(
            (line.label, str(arm.sample.n if arm.sample else 0), value(line.y[0]),
             span(line.intervals[0]))
            for line, arm in zip(lines, arms, strict=True)
        )  # fmt: skip
        columns = _columns("arm", "seeds", "mean", "95% interval")
        return Exhibit(title, Markup(figures.arms(lines, metric)), Grid("", columns, cells))
    name, series = curves
    ticks = sorted({x for one in series for x in one.x})
    columns = _columns("arm", *(f"{tick:g}" for tick in ticks))
    values = tuple((one.label, *(_at(one, tick) for tick in ticks)) for one in series)
    notes = (f"Means over seeds, by {name}; bars are 95% intervals.",)
    return Exhibit(
        f"{title}, against {name}",
        Markup(figures.against(series, name, metric)),
        Grid("", columns, values, notes),
        _legend(series),
    )


def contrasts(table: Table) -> Exhibit | None:
    """The differences that the experiment lists, those of one pair of arms on one line."""
    if not table.contrasts:
        return None
    names = list(dict.fromkeys(pair_name(one) for one in table.contrasts))
    swept = dict.fromkeys(one.words(table.varying) for one in table.contrasts)
    # A pair that has no part in what is swept stands in every cell.
    by_cell: dict[str, dict[str, Sample]] = {cell: {} for cell in swept if cell} or {"": {}}
    for one in table.contrasts:
        cell = one.words(table.varying)
        for each in [cell] if cell else by_cell:
            by_cell[each][pair_name(one)] = one.difference.sample
    series = [
        Series(
            cell or "difference",
            Look("dense", "learned", 3 * place),
            [float(names.index(name)) for name in found],
            [sample.mean for sample in found.values()],
            [sample.interval for sample in found.values()],
        )
        for place, (cell, found) in enumerate(by_cell.items())
    ]
    cells = tuple(
        (name, *(with_interval(found.get(name)) for found in by_cell.values())) for name in names
    )
    drawn = figures.differences(series, names, lower_is_better=table.lower_is_better)
    return Exhibit(
        f"differences in {metric_name(table.metric)}, paired by seed",
        Markup(drawn),
        Grid("", _columns("contrast", *(one.label for one in series)), cells),
        _legend(series) if len(series) > 1 else (),
    )


def frontiers(tables: Sequence[Table], measured: Sequence[Measured]) -> Iterator[Exhibit]:
    """Means against measured speed, of structures and sparsities of which both are known."""
    for table in tables:
        metric = metric_name(table.metric)
        for speeds in measured:
            known = [(arm, _speed(arm, speeds)) for arm in _once(table.arms) if arm.sample]
            found = [(arm, speed) for arm, speed in known if speed is not None]
            if len({structure_of(arm.first["structure"]) for arm, _ in found}) < 2:
                continue
            series, cells = [], []
            for arm, speed in found:
                name = _label(arm, table)
                series.append(_series(name, [arm], [speed.strongest]))
                mean = value(series[-1].y[0])
                cells.append((name, mean, f"{speed.strongest:.2f}", f"{speed.usual:.2f}"))
            drawn = figures.against_speed(series, metric, lower_is_better=table.lower_is_better)
            what = "layers of ViT-B" if speeds.unit == "tokens" else "whole models"
            columns = _columns("arm", metric, "over fastest dense", "over PyTorch")
            yield Exhibit(
                f"{metric}, {table.model} on {table.dataset}, {table.scale} scale; "
                f"speed of {what}, forward, {speeds.tokens} {speeds.unit}, {speeds.device}",
                Markup(drawn),
                Grid("", columns, tuple(cells), (f"Speed: {speeds.name}: {speeds.where}.",)),
                _looks(series),
            )


def penalties(runs: Sequence[tuple[Row, Run]]) -> Iterator[Exhibit]:
    """How far soft permutations were from hard ones, and when they hardened."""
    groups: dict[tuple[str, str], dict[str, tuple[Row, Run]]] = defaultdict(dict)
    for row, run in runs:  # the lowest seed comes first
        soft = run.summary.get("permutations")
        if run.state == "finished" and isinstance(soft, dict) and soft.get("penalty_curve"):
            arm = f"{row['arm']} {row['swept']}".strip()
            groups[row["experiment"], row["scale"]].setdefault(arm, (row, run))
    for (experiment, scale), by_arm in groups.items():
        curves, cells, legend = [], [], []
        for name, (row, run) in list(by_arm.items())[:MOST_CURVES]:
            look = Look(structure_of(row["structure"]), "learned")
            curve, hardened = _penalty(run)
            curves.append((look, curve, hardened))
            legend.append((_swatch(look), name))
            ends = f"{hardened[0][0]:.0f} to {hardened[-1][0]:.0f}%" if hardened else ""
            counts = [_count(row[key]) for key in ("hardened", "forced", "still_soft")]
            jump = row["largest_loss_jump"]
            cells.append((name, *counts, ends, "" if jump is None else f"{jump:+.4f}"))
        notes = ["The run of the lowest seed of each arm; jump: of its training loss."]
        if len(by_arm) > MOST_CURVES:
            notes.append(f"{len(by_arm) - MOST_CURVES} more arms are not drawn.")
        columns = _columns("arm", "hardened", "forced", "still soft", "at", "largest jump")
        yield Exhibit(
            f"{experiment}, {scale} scale",
            Markup(figures.penalties(curves)),
            Grid("", columns, tuple(cells), tuple(notes)),
            tuple(legend),
        )


def pictures(runs: Sequence[tuple[Row, Run]]) -> Iterator[Exhibit]:
    """The mask, the permutation, and both together, of a run of each structure."""
    candidates: dict[str, list[tuple[Row, Run]]] = defaultdict(list)
    for row, run in runs:
        # Of many runs the checkpoints are deleted, or lie elsewhere.
        saved = run.state == "finished" and any((run.path / "checkpoints").glob("*.pt"))
        if saved and structure_of(row["structure"]) not in ("dense", "own", ""):
            candidates[row["structure"]].append((row, run))
    for label, own in list(candidates.items())[:MOST_PICTURES]:
        row, run = min(own, key=lambda pair: _interest(pair[0]))
        try:
            found = picture(run)
        except UserError as error:
            say(f"warning: no picture of {run.path.name}: {error}")
            continue
        images = [("mask", found.mask)]
        if found.permutation is not None:
            images += [("permutation", found.permutation), ("both", found.connections)]
        shown = Markup("").join(
            BITMAP.format(
                f"{name} of {label}", figures.bitmap(matrix.numpy(), structure_of(label)), name
            )
            for name, matrix in images
        )
        rows, columns = found.mask.shape
        cells = (
            ("layer", found.layer),
            ("outputs and inputs", f"{rows} and {columns}"),
            ("density", f"{found.density:.4f}"),
            ("permutation", str(row["permutation"])),
            ("of", {"in": "inputs", "out": "outputs"}[found.side] if len(images) > 1 else ""),
            ("features moved", f"{100 * found.moved:.0f}%"),
            ("run", str(row["run"])),
        )
        yield Exhibit(label, shown, Grid("", (Column("", False), Column("", False)), cells))


def timings(measured: Sequence[Measured]) -> Iterator[Exhibit]:
    """Milliseconds of one pass, and the floor of the roofline."""
    for table in measured:
        title, bars = table.bars()
        if not bars:
            continue
        looks = [Look(structure_of(bar.structure), "learned") for bar in bars]
        drawn = figures.timings([
            (bar.name, look, bar.milliseconds, bar.floor)
            for bar, look in zip(bars, looks, strict=True)
        ])  # fmt: skip
        cells = tuple(
            (
                bar.name,
                f"{bar.milliseconds:.4g}",
                _known(bar.floor, ".4g"),
                _known(bar.floor / bar.milliseconds, ".2f"),
                f"{bar.usual:.2f}",
                f"{bar.strongest:.2f}",
            )
            for bar in bars
        )
        notes = (
            f"{table.name}: {table.where}.",
            "Floor: weights from memory at the rate of a copy, or arithmetic at that of the "
            "fastest dense product, in ms; share: of it in the time. Over: times as fast as the "
            "faster of eager and compiled dense PyTorch, and as the fastest dense product timed.",
        )
        columns = _columns("contender", "ms", "floor", "share", "over PyTorch", "over fastest")
        yield Exhibit(f"{title}, {table.device}", Markup(drawn), Grid("", columns, cells, notes))


def left_out(rows: Iterable[Row], problems: Iterable[str]) -> Grid:
    """Runs without a result, with the reason."""
    cells = [
        (
            str(row["experiment"]),
            str(row["run"]),
            "not finite" if row["state"] == "finished" else str(row["state"]),
            str(row["why"]),
        )
        for row in rows
        if row["state"] != "finished" or row["value"] is None
    ]
    cells += [("", "", "unreadable", problem) for problem in problems]
    columns = tuple(Column(name, False) for name in ("experiment", "run", "state", "why"))
    return Grid("", columns, tuple(cells))


def _columns(first: str, *rest: str) -> tuple[Column, ...]:
    return Column(first, False), *(Column(heading, True) for heading in rest)


def _curves(table: Table, arms: Sequence[Arm]) -> tuple[str, list[Series]] | None:
    """The series of each arm over the one number that is swept, and what that is, if so."""
    if len(table.varying) != 1:
        return None
    (name,) = table.varying
    order = store.arms(table.experiment)
    by_name: dict[str, list[tuple[float, Arm]]] = {name: [] for name in order}
    try:
        for arm in arms:
            by_name.setdefault(arm.name, [])
            by_name[arm.name].append((float(arm.swept[name]), arm))
    except (KeyError, ValueError):
        return None
    if len({x for points in by_name.values() for x, _ in points}) < FEWEST_POINTS:
        return None
    percent = name == "sparsity"
    series = []
    variants: dict[Look, int] = defaultdict(int)
    for label, points in by_name.items():
        if not points:
            continue
        points.sort(key=lambda point: point[0])
        x = [round(100 * at, 6) if percent else at for at, _ in points]
        one = _series(label, [arm for _, arm in points], x)
        series.append(replace(one, look=replace(one.look, variant=variants[one.look])))
        variants[one.look] += 1
    return "sparsity (%)" if percent else name, series


def _series(label: str, arms: Sequence[Arm], x: Sequence[float]) -> Series:
    samples = [arm.sample for arm in arms if arm.sample]
    look = Look(structure_of(arms[0].first["structure"]), arms[0].permutation)
    means = [sample.mean for sample in samples]
    return Series(label, look, x, means, [sample.interval for sample in samples])


def _label(arm: Arm, table: Table) -> str:
    """The name of an arm, with what is swept where that tells its cells apart."""
    own = {id(row) for row in arm.rows}
    cells = sum(any(id(row) in own for row in other.rows) for other in table.arms)
    if cells > 1:
        return arm.name
    swept = [f"{key.rpartition('.')[2]}={arm.swept.get(key)}" for key in table.varying]
    return " ".join([arm.name, *swept])


def _at(series: Series, x: float) -> str:
    return next((value(y) for at, y in zip(series.x, series.y, strict=True) if at == x), "")


def _once(arms: Sequence[Arm]) -> list[Arm]:
    """Without repetition: one that has no part in what is swept stands in several cells."""
    return list({(arm.name, tuple(map(id, arm.rows))): arm for arm in arms}.values())


def _legend(series: Sequence[Series]) -> Legend:
    return tuple((_swatch(one.look), one.label) for one in series)


def _looks(series: Sequence[Series]) -> Legend:
    """A legend of what is drawn alike."""
    names = {"none": "no permutation", "random": "random", "learned": "learned"}
    looks = dict.fromkeys(one.look for one in series)
    return tuple(
        (_swatch(look, line=False), f"{look.structure}, {names[look.permutation]}")
        for look in looks
    )


def _swatch(look: Look, *, line: bool = True) -> Markup:
    return Markup(figures.swatch(look, line=line))


def _interest(row: Row) -> tuple[bool, bool, int]:
    """Learned permutations first, then random ones, then none."""
    chosen = row["permutation"]
    return not learned(chosen), chosen == "none", row["seed"]


def _speed(arm: Arm, speeds: Measured) -> Speed | None:
    label = str(arm.first["structure"])
    if structure_of(label) == "dense":
        return Speed(1.0, 1.0)
    return speeds.speed(label, arm.sparsity, permuted=arm.permutation != "none")


def _penalty(run: Run) -> tuple[Points, Points]:
    """Mean penalties and hardenings by the share of training, in percent."""
    permutations, steps = run.summary["permutations"], number(run.summary.get("steps"))

    def points(rows: object, key: str) -> Points:
        found = [
            (100 * number(row.get("step")) / steps, number(row.get(key)))
            for row in (rows if isinstance(rows, list) else ())
            if isinstance(row, dict)
        ]
        return sorted(point for point in found if not any(map(math.isnan, point)))

    if not steps > 0:
        return [], []
    curve = points(permutations.get("penalty_curve"), "mean")
    return curve, points(permutations.get("events"), "penalty")


def _count(count: float | None) -> str:
    return "" if count is None else f"{count:.0f}"


def _known(number: float, form: str) -> str:
    return format(number, form) if math.isfinite(number) else ""
