"""The tables of runs, results/tables/<experiment>.csv: a row for each run in an experiment.

A row stays when its run is gone (it lies on another machine, or was deleted) until a run at the
same place takes it over; whoever wants to begin anew deletes the file.
"""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from padst_exp.atomic import replace_text
from padst_exp.config import closest, config_dir
from padst_exp.errors import require
from padst_exp.files import one_line, reading
from padst_exp.identity import FREE, LOCATIONS, flat, results_part
from padst_exp.report.choices import nearest_option, structure_label
from padst_exp.report.runs import MOST_BYTES, Place, Run, number

Row = dict[str, Any]

PLACE = ("experiment", "scale", "arm", "swept", "model", "dataset", "sparsity", "seed")
NUMBERS = (
    "value", "best", "density", "density_of_model", "parameters", "steps", "hardened", "forced",
    "still_soft", "largest_loss_jump", "seconds", "samples_per_second", "tokens_per_second",
    "input_wait_share", "flops_per_step", "flops_per_second", "mfu", "joules_per_sample",
    "peak_memory_mb", "peak_device_memory_mb",
)  # fmt: skip
COLUMNS = (
    "experiment", "scale", "arm", "swept", "seed", "state", "why", "metric", "value", "best",
    "method", "model", "dataset", "structure", "dst", "permutation", "transform", "sparsity",
    "density", "density_of_model", "parameters", "steps", "metrics",
    "hardened", "forced", "still_soft", "largest_loss_jump",
    "seconds", "samples_per_second", "tokens_per_second",
    "input_wait_share", "flops_per_step", "flops_per_second", "mfu", "joules_per_sample",
    "peak_memory_mb", "peak_device_memory_mb",
    "device", "device_name", "processes", "threads", "commit", "dirty",
    "python", "torch", "triton", "timm", "transformers", "numpy", "scipy",
    "config_hash", "run", "overrides",
)  # fmt: skip
_GROUPS = ("model", "dataset", "dst", "permutation", "transform")
_PACKAGES = ("torch", "triton", "timm", "transformers", "numpy", "scipy")
# Where a run was made and how it was watched are no part of what it is.
_LEFT_OUT = FREE | LOCATIONS | {"seed", "experiment", "scale", "arm"}


def rows(placed: Iterable[tuple[Place, Run]]) -> list[tuple[Row, Run]]:
    """One row for each run in each experiment; where it has no arm, its choices are one."""
    found = [(_row(place, run), run) for place, run in placed]
    for row, _ in found:
        row["arm"] = row["arm"] or _name_arm(row)
    _tell_apart(found)
    return sorted(found, key=lambda pair: _order(pair[0]))


def merged(folder: Path, new: Iterable[Row]) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of each experiment: `new` ones, and of its table the others.

    Args:
        folder: of the tables; those that hold something else are left alone.
        new: from `rows`.

    Returns:
        The rows by experiment, and what is to be said of them.

    Raises:
        UserError: a table of ours is damaged.
    """
    tables: dict[str, list[Row]] = {}
    said = []
    for path in sorted(folder.glob("*.csv")) if folder.is_dir() else ():
        old = read(path)
        if old:
            tables[old[0]["experiment"]] = old
    for experiment, own in _by_experiment(new).items():
        places = {_place(row) for row in own}
        # What has no result must not hide one that was there.
        had = [row for row in tables.get(experiment, []) if row["value"] is not None]
        known = {_place(row): row for row in had}
        changed = sum(
            row["value"] is not None
            and row["config_hash"] != known.get(_place(row), row)["config_hash"]
            for row in own
        )
        if changed:
            said.append(f"{experiment}: {changed} rows were of runs with another config")
        own = [row if row["value"] is not None else known.get(_place(row), row) for row in own]
        # A run that was not begun has no model to be told by, and tells nothing once it is begun.
        others = [row for row in tables.get(experiment, []) if row["state"] != "not begun"]
        kept = [row for row in others if _place(row) not in places]
        tables[experiment] = sorted([*own, *kept], key=_order)
    return tables, said


def read(path: Path) -> list[Row]:
    """The rows of a table that `write` wrote; none of another table."""
    with reading("out", path, "a table of runs"):
        if path.stat().st_size > MOST_BYTES:
            return []
        text = path.read_text("utf-8")
        if not text.startswith(",".join(COLUMNS[:6])):
            return []
        return [_typed(row) for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)]


def write(folder: Path, experiment: str, table: Sequence[Row]) -> Path:
    """Write the table of an experiment; beside one of that name that holds something else."""
    path = folder / f"{experiment}.csv"
    if path.exists() and not read(path):
        path = folder / f"{experiment}_runs.csv"
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="raise")
    writer.writeheader()
    writer.writerows({key: "" if v is None else v for key, v in row.items()} for row in table)
    replace_text(path, text.getvalue())
    return path


def learned(permutation: str) -> bool:
    """Whether an option of the group `permutation` learns anything."""
    return permutation not in ("none", "random", "")


def _row(place: Place, run: Run) -> Row:
    summary, environment, config = run.summary, run.environment, run.config
    timing, permutations = _mapping(summary.get("timing")), _mapping(summary.get("permutations"))
    packages = _mapping(environment.get("packages"))
    metric = one_line(str(summary.get("monitor", "")))
    final, best = _mapping(summary.get("final")), _mapping(summary.get("best"))
    others = [f"{one_line(str(k))}={v:.6g}" for k, v in final.items() if _other(k, metric, v)]
    chosen = {
        group: nearest_option(group, config.get(group)) if config else "" for group in _GROUPS
    }
    still_soft = permutations.get("still_soft")
    row: Row = {
        "experiment": place.experiment,
        "scale": place.scale,
        "arm": one_line(place.arm),
        "swept": _words(place),
        "seed": place.seed,
        "state": run.state,
        "why": run.why.replace(f"{run.path}/", "").replace(f"{run.path}", run.path.name),
        "metric": metric,
        "value": final.get(metric),
        "best": best.get(metric),
        **chosen,
        "structure": structure_label(config.get("structure")) if config else "",
        "sparsity": config.get("sparsity", ""),
        "density": summary.get("density_of_layers"),
        "density_of_model": summary.get("density_of_model"),
        "parameters": summary.get("parameters"),
        "steps": summary.get("steps"),
        "metrics": " ".join(others),
        "hardened": permutations.get("hardened"),
        "forced": permutations.get("forced"),
        "still_soft": len(still_soft) if isinstance(still_soft, list) else None,
        "largest_loss_jump": permutations.get("largest_loss_jump"),
        **{key: timing.get(key) for key in NUMBERS if key in timing},
        "commit": environment.get("git_commit"),
        "dirty": environment.get("git_dirty"),
        **{key: environment.get(key) for key in
           ("device", "device_name", "processes", "threads", "python")},
        **{key: packages.get(key) for key in _PACKAGES},
        # The places of data are part of it, and may be others by now.
        "config_hash": place.hash or run.hash,
        "run": run.path.name,
        # Whoever pastes them into a shell gets words, whatever is in them.
        "overrides": shlex.join(_telling(place.overrides or run.overrides)),
    }  # fmt: skip
    row["method"] = method(row, config)
    full = dict.fromkeys(COLUMNS) | row
    return _typed({key: "" if v is None else one_line(str(v)) for key, v in full.items()})


def method(row: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What published tables call what a run does, empty for what none of them has."""
    structure, dst = row["structure"].partition(" ")[0], row["dst"]
    if structure == "dense":
        return "dense"
    named = {
        ("butterfly", "static"): "pixelated_bfly",
        ("shuffled_block", "dsb"): "dsb",
        ("fan_in", "srigl"): "srigl",
        ("diag", "dynadiag"): "dynadiag",
        ("diag", "set"): "diag_heur",
        ("nm", "sr_ste"): "sr_ste",
    }
    name = dst if structure == "unstructured" else named.get((structure, dst), "")
    if not name or row["permutation"] == "random":
        return ""
    algorithm = _mapping(config.get("dst"))
    if name == "srigl" and algorithm.get("ablation") is False:
        name = "srigl ablation=false"
    if name == "dynadiag" and config.get("distribution") == "erk":
        name = "dynadiag distribution=erk"
    if name == "dynadiag" and algorithm.get("schedule") in ("linear", "constant"):
        name = f"dynadiag temperature={algorithm['schedule']}"
    if row["transform"] not in ("none", ""):
        name = f"{row['transform']} {name}"
    return f"{name} + learned permutation" if learned(row["permutation"]) else name


def _name_arm(row: Row) -> str:
    """An arm for a run outside of a sweep of arms: its choices."""
    words = [row["structure"] or row["run"], row["dst"], row["permutation"], row["transform"]]
    usual = ("", "rigl", "none", "none")
    return " ".join(w for w, u in zip(words, usual, strict=True) if w and w != u)


def _tell_apart(found: Sequence[tuple[Row, Run]]) -> None:
    """Let runs of one arm that differ in more than their seed differ in what is swept."""
    tables: dict[tuple[str, ...], list[tuple[Row, Run]]] = defaultdict(list)
    for row, run in found:
        if run.config:
            keys = ("experiment", "scale", "model", "dataset")
            tables[tuple(row[key] for key in keys)].append((row, run))
    for own in tables.values():
        leaves = [dict(flat(results_part(run.config))) for _, run in own]
        arms: dict[tuple[str, ...], list[Mapping[str, object]]] = defaultdict(list)
        for (row, _), one in zip(own, leaves, strict=True):
            arms[row["arm"], row["swept"], str(row["sparsity"])].append(one)
        varying = {
            key: None
            for alike in arms.values()
            for key in dict.fromkeys(key for one in alike for key in one)
            if key not in _LEFT_OUT and len({repr(one.get(key)) for one in alike}) > 1
        }
        for (row, _), one in zip(own, leaves, strict=True):
            words = [f"{key}={one[key]}" for key in varying if key in one]
            row["swept"] = one_line(" ".join(filter(None, [row["swept"], *words])))


def _typed(row: Mapping[Any, Any]) -> Row:
    """A row with numbers where there are some, and None where one is missing or not finite."""
    typed: Row = {column: row.get(column) or "" for column in COLUMNS}
    for column in NUMBERS:
        try:
            value = float(typed[column])
        except ValueError:
            value = math.nan
        typed[column] = value if math.isfinite(value) else None
    try:
        typed["seed"] = int(row["seed"] or 0)
    except ValueError:
        typed["seed"] = 0
    return typed


def _order(row: Row) -> tuple[Any, ...]:
    """By arms, as the experiment's file has them, then what is swept, then seeds."""
    order = arms(row["experiment"])
    place = order.index(row["arm"]) if row["arm"] in order else len(order)
    chosen = row["permutation"]
    softness = 2 if learned(chosen) else ("none", "random").index(chosen or "none")
    return (
        row["scale"], row["model"], row["dataset"], place, row["structure"], softness, row["arm"],
        row["swept"], row["sparsity"], row["seed"], row["run"],
    )  # fmt: skip


def arms(experiment: str) -> tuple[str, ...]:
    """The arms of an experiment in the order of its file; none where there is no such file."""
    return _names(_sweeper(experiment, "arms"))


def params(experiment: str) -> tuple[str, ...]:
    """The keys that an experiment sweeps besides arms."""
    return _names(_sweeper(experiment, "params"))


def contrasts(experiment: str) -> tuple[tuple[str, str], ...]:
    """The pairs of arms that an experiment lists to be compared, the first less the second.

    Raises:
        UserError: something listed is no pair of its arms.
    """
    listed = _sweeper(experiment, "contrasts")
    key, known = "hydra.sweeper.contrasts", arms(experiment)
    require(listed is None or isinstance(listed, list), key, repr(listed), "pairs of arms")
    found = []
    for pair in listed or ():
        names = [str(name) for name in pair] if isinstance(pair, list) else []
        guess = next((closest(name, known) for name in names if name not in known), "")
        sound = len(set(names)) == len(names) == 2 and set(names) <= set(known)
        require(sound, key, repr(pair), f"two arms of experiment={experiment}{guess}")
        found.append((names[0], names[1]))
    return tuple(found)


@cache
def _sweeper(experiment: str, part: str) -> Any:
    """What the file of an experiment says of a key of its sweeper; None for nothing."""
    path = config_dir() / "experiment" / f"{experiment}.yaml"
    content = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else None
    for key in ("hydra", "sweeper", part):
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _names(content: object) -> tuple[str, ...]:
    return tuple(map(str, content)) if isinstance(content, dict) else ()


def _by_experiment(table: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in table:
        found[row["experiment"]].append(row)
    return found


def _place(row: Row) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in PLACE)


def _telling(overrides: Iterable[str]) -> list[str]:
    """Overrides without those of this machine, and without the seed, which has a column."""
    dropped = FREE | LOCATIONS | {"seed"}
    return [o for o in overrides if o.lstrip("+~").partition("=")[0] not in dropped]


def _words(place: Place) -> str:
    """What is swept, without what is in the arm's name or has a table of its own."""
    apart = {"model", "dataset"} if place.arm else {*_GROUPS, "structure"}
    words = [f"{key}={value}" for key, value in place.swept.items() if key not in apart]
    return one_line(" ".join(words))


def _other(key: object, metric: str, value: object) -> bool:
    return key not in ("step", metric) and math.isfinite(number(value))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
