"""The page: one HTML file that needs nothing else, and in which all text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from padst_exp.report import exhibits
from padst_exp.report.compare import Table
from padst_exp.report.exhibits import Exhibit
from padst_exp.report.figures import COLOURS
from padst_exp.report.runs import Run
from padst_exp.report.speeds import Measured
from padst_exp.report.store import Row
from padst_exp.report.tables import SCALES, Grid, contrasts, grid

NOTHING = "python -m padst_exp.train -m experiment=structures seed=0,1,2"


@dataclass(frozen=True)
class Chapter:
    """What is said of one experiment: of each table what is drawn, it and its contrasts."""

    name: str
    parts: tuple[tuple[list[Exhibit], Grid, Grid | None], ...]


def text(
    rows: Mapping[str, Sequence[Row]],
    tables: Mapping[str, Sequence[Table]],
    runs: Sequence[tuple[Row, Run]],
    measured: Sequence[Measured],
    problems: Sequence[str],
) -> str:
    """The text of the page.

    Args:
        rows: of all runs, by experiment.
        tables: of their arms, by experiment.
        runs: what is drawn of more than tables hold: penalties, checkpoints.
        measured: speeds.
        problems: what could not be read, in lines.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    every = [table for own in tables.values() for table in own]
    all_rows = [row for own in rows.values() for row in own]
    finished = [row for row in all_rows if row["value"] is not None]
    return environment.get_template("page.html").render(
        colours=COLOURS,
        finished=len(finished),
        experiments=len(tables),
        scales=[SCALES[scale] for scale in dict.fromkeys(row["scale"] for row in finished)],
        nothing=NOTHING,
        key=exhibits.key(every),
        chapters=[
            Chapter(
                name,
                tuple((drawn(table), grid(table), contrasts(table)) for table in own),
            )
            for name, own in tables.items()
        ],
        frontiers=list(exhibits.frontiers(every, measured)),
        penalties=list(exhibits.penalties(runs)),
        pictures=list(exhibits.pictures(runs)),
        timings=list(exhibits.timings(measured)),
        left_out=exhibits.left_out(all_rows, problems),
    )


def drawn(table: Table) -> list[Exhibit]:
    """The exhibits of one table."""
    both = exhibits.results(table), exhibits.contrasts(table)
    return [one for one in both if one is not None]
