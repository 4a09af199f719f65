"""All of it: runs are read, tables and the page are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from padst_exp.atomic import replace_text
from padst_exp.errors import UserError
from padst_exp.report import compare, items, page, published, runs, speeds, store, tables


def report(
    folders: Sequence[Path],
    *,
    experiments: Sequence[str] | None,
    baseline: str | None,
    out: Path,
    kernels: Path,
    published: Path,
) -> Iterator[str]:
    """Write the tables and the page of all runs in some folders.

    Args:
        folders: of run directories.
        experiments: to report; None for all.
        baseline: arm that all others are paired with; None for the control of each.
        out: folder for tables/ and report.html.
        kernels: folder of measured speeds.
        published: file of numbers that papers print.

    Yields:
        Lines to say.

    Raises:
        UserError: there are no runs, nothing can be written, a table is damaged, or an experiment
            lists a contrast of what is no arm of it.
    """
    found = runs.find(folders)
    papers = published_numbers(published)
    measured = speeds.read(kernels)
    folder = out / "tables"
    pairs = store.rows(found.placed)
    stored, notes = store.merged(folder, [row for row, _ in pairs])
    if not stored:
        where = ", ".join(map(str, folders))
        raise UserError(
            f"runs: expected folders with runs, found none in {where}; {page.NOTHING} makes some"
        )
    if experiments is not None:
        missing = [name for name in experiments if name not in stored]
        if missing:
            known = ", ".join(stored) or "none"
            raise UserError(f"experiments: expected some of {known}, got {', '.join(missing)}")
        stored = {name: stored[name] for name in experiments}
    stored = dict(sorted(stored.items(), key=lambda item: _prominence(item[0])))
    by_name = {row["run"]: run for row, run in pairs}
    outcomes = {
        name: items.collected(folder / f"{name}.csv", own, by_name) for name, own in stored.items()
    }
    compared = {
        name: compare.tables(own, papers, baseline=baseline, outcomes=outcomes[name])
        for name, own in stored.items()
    }
    if baseline is not None and not any(
        arm.name == baseline for own in compared.values() for table in own for arm in table.arms
    ):
        raise UserError(f"baseline: expected the name of an arm, got {baseline}")
    pairs = [(row, run) for row, run in pairs if row["experiment"] in compared]
    try:
        for name, own in stored.items():
            path = store.write(folder, name, own)
            items.keep(path, outcomes[name])
            grids = tables.grids(compared[name])
            replace_text(path.with_suffix(".md"), tables.document(grids, "markdown"))
            replace_text(path.with_suffix(".tex"), tables.document(grids, "latex"))
            states = [row["state"] for row in own]
            count = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
            yield f"{name}: {count}; {path}, .md and .tex"
        path = out / "report.html"
        replace_text(path, page.text(stored, compared, pairs, measured, found.problems))
    except OSError as error:
        why = error.strerror
        raise UserError(f"out: expected a folder to write to, got {out} ({why})") from error
    yield from notes
    yield from found.problems
    if not any(row["value"] is not None for own in stored.values() for row in own):
        yield f"no finished runs in {', '.join(map(str, folders))}; {page.NOTHING} makes some"
    yield f"wrote {path}"


def _prominence(experiment: str) -> tuple[bool, bool, str]:
    """The headline question first, single runs last."""
    return experiment == runs.NO_EXPERIMENT, not experiment.startswith("headline"), experiment


published_numbers = published.read
