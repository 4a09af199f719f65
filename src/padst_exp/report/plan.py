"""What an experiment would take, from what was measured: runs, hours, memory, disk.

Nothing is guessed. What no earlier run and no table of results/kernels tells has no number.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
from omegaconf import OmegaConf

from padst_exp.config import build, config_dir
from padst_exp.files import one_line, reading
from padst_exp.identity import replicate_hash
from padst_exp.report import runs as found_runs
from padst_exp.report.choices import nearest_option, structure_label
from padst_exp.report.runs import Run, number
from padst_exp.report.store import learned
from padst_exp.sweeps import compose, jobs

Config = Mapping[str, Any]

# Training images, as their publishers count them; sizes of texts depend on how they are cut.
SAMPLES = {
    "imagenet1k": 1_281_167,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "fashion_mnist": 60_000,
}
MOST_NAMED = 6


@dataclass(frozen=True)
class Wanted:
    """One configuration that is to run, at each of its seeds.

    Args:
        label: its arm and what is swept.
        config: of one seed.
        seeds: how many.
    """

    label: str
    config: Config
    seeds: int


@dataclass(frozen=True)
class Measure:
    """A number for one run, with where it comes from."""

    value: float
    source: str
    device: str = ""


def plan(overrides: Sequence[str], kernels: Path) -> Iterator[str]:
    """What the runs of a command line would take, in lines.

    Args:
        overrides: of a training or a sweep; `runs` is where earlier runs are looked for.
        kernels: folder of measured speeds.

    Raises:
        UserError, HydraException: the command line is no sweep.
    """
    wanted = _wanted(overrides)
    total = sum(one.seeds for one in wanted)
    folder = Path(str(wanted[0].config["runs"]))
    earlier = _finished(folder)
    yield f"runs: {total}, {_seeds(wanted)} of {_several(len(wanted), 'configuration')}"
    missing: dict[str, list[str]] = {}
    for name, lines in (
        ("time", _hours(wanted, earlier, _tables(kernels, "model_train"))),
        ("memory", _memory(wanted, earlier, _tables(kernels, "memory"))),
        ("disk", _disk(wanted, earlier)),
    ):
        said, unknown = lines
        yield from said
        if unknown:
            missing.setdefault(_named(unknown, len(wanted)), []).append(name)
    for labels, names in missing.items():
        yield f"no measurement of {', '.join(names)} for {labels}"
    if missing:
        yield f"a finished run of such a model and structure in {folder} is one, however short"


def _wanted(overrides: Sequence[str]) -> list[Wanted]:
    """The configurations of a sweep, each composed once."""
    groups: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for job in jobs(overrides):
        key = tuple(o for o in job.overrides if o.partition("=")[0] != "seed")
        groups[key].append(job)
    found = []
    for own in groups.values():
        job = own[0]
        cfg = compose(job.overrides)
        build(cfg.trainer, "trainer")  # says what is wrong with it
        config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        swept = [f"{key}={value}" for key, value in job.swept.items()]
        label = one_line(" ".join([*filter(None, [job.arm]), *swept]))
        found.append(Wanted(label or "this run", config, len(own)))
    return found


def _hours(
    wanted: Sequence[Wanted], earlier: Sequence[Run], tables: Sequence[pd.DataFrame]
) -> tuple[list[str], list[str]]:
    """What can be said, and the labels of what is unknown."""
    by_device: dict[str, float] = defaultdict(float)
    sources: dict[str, dict[str, int]] = defaultdict(dict)
    unknown = []
    for one in wanted:
        measure = _seconds(one, earlier, tables)
        if measure is None:
            unknown.append(one.label)
            continue
        by_device[measure.device] += measure.value * one.seeds
        sources[measure.device].setdefault(measure.source, 0)
        sources[measure.device][measure.source] += one.seeds
    said = []
    for device, seconds in by_device.items():
        runs = _several(sum(sources[device].values()), "run")
        said.append(f"time: {_duration(seconds)} on {device} for {runs}, one after another")
        said += [f"  {_several(count, 'run')} by {s}" for s, count in sources[device].items()]
    return said, unknown


def _seconds(one: Wanted, earlier: Sequence[Run], tables: Sequence[pd.DataFrame]) -> Measure | None:
    """Of one run."""
    same = replicate_hash(one.config)
    for run in earlier:
        seconds = number(_timing(run).get("seconds"))
        if seconds > 0 and replicate_hash(run.config) == same:
            return Measure(seconds, f"{run.path.name}, the same but for its seed", _device(run))
    samples = _samples(one.config, earlier)
    if samples is None:
        return None
    for run in earlier:
        # Of another length or algorithm, or a sparsity that is nearly the same.
        throughput = number(_timing(run).get("samples_per_second"))
        if throughput > 0 and _alike(run.config, one.config):
            source = f"{throughput:.4g} samples/s of {run.path.name}"
            return Measure(samples / throughput, source, _device(run))
    for frame in tables:
        rows = _rows(frame, one.config)
        rows = rows[(rows["pass"] == "training step") & rows.form.isin(["eager", "compiled"])]
        if not rows.empty:
            row = rows.loc[rows.p50_ms.idxmin()]
            seconds = samples / row.tokens * row.p50_ms / 1000
            device = f"{row.device}, {row['dtype']}, {row.threads} thread(s)"
            source = (
                f"{row.p50_ms:g} ms a training step of {row.tokens} samples, {row.suite}, "
                f"{row.structure}, permutations {row.permutation}"
            )
            return Measure(seconds, one_line(source), one_line(device))
    return None


def _samples(config: Config, earlier: Sequence[Run]) -> float | None:
    """Training samples that one run sees."""
    trainer = config["trainer"]
    if trainer.get("steps") is not None:
        return float(trainer["steps"] * trainer["batch_size"])
    size = SAMPLES.get(nearest_option("dataset", config["dataset"]))
    if size is None:
        for run in earlier:
            theirs = _trainer(run.config)
            epochs, batch = number(theirs.get("epochs")), number(theirs.get("batch_size"))
            seen = number(run.summary.get("steps")) * batch
            if run.config.get("dataset") == config["dataset"] and epochs > 0 and seen > 0:
                size = int(seen / epochs)
                break
    return None if size is None else float(size * trainer["epochs"])


def _memory(
    wanted: Sequence[Wanted], earlier: Sequence[Run], tables: Sequence[pd.DataFrame]
) -> tuple[list[str], list[str]]:
    """As `_hours`."""
    largest: Measure | None = None
    unknown = []
    for one in wanted:
        measure = _peak(one, earlier, tables)
        if measure is None:
            unknown.append(one.label)
        elif largest is None or measure.value > largest.value:
            largest = measure
    if largest is None:
        return [], unknown
    return [f"memory: up to {_bytes(largest.value)} a run, by {largest.source}"], unknown


def _peak(one: Wanted, earlier: Sequence[Run], tables: Sequence[pd.DataFrame]) -> Measure | None:
    """Bytes of one process, at most."""
    for run in earlier:
        timing = _timing(run)
        peak = number(timing.get("peak_device_memory_mb", timing.get("peak_memory_mb"))) * 2**20
        if peak > 0 and _alike(run.config, one.config):
            return Measure(peak, f"the peak of {run.path.name} ({_device(run)})")
    batch = one.config["trainer"]["batch_size"] // one.config["trainer"]["micro_batches"]
    for frame in tables:
        rows = _rows(frame, one.config)
        if not rows.empty:
            row = rows.loc[rows.peak_bytes.idxmax()]
            # Activations alone grow with the batch; what training keeps was measured apart.
            kept = sum(float(row[f"{name}_bytes"]) for name in _KEPT)
            peak = kept + (float(row.peak_bytes) - kept) * batch / row.tokens
            source = (
                f"{_bytes(kept)} of parameters, gradients and moments and {_bytes(peak - kept)} of "
                f"activations, from {row.suite} at batch {row.tokens} on {row.device}"
            )
            return Measure(peak, one_line(source))
    return None


_KEPT = ("parameters", "gradients", "moments", "indices")


def _disk(wanted: Sequence[Wanted], earlier: Sequence[Run]) -> tuple[list[str], list[str]]:
    """As `_hours`."""
    total, known, unknown, source = 0.0, 0, [], ""
    for one in wanted:
        for run in earlier:
            if _alike(run.config, one.config) and (size := _size(run.path)):
                total, known = total + size * one.seeds, known + one.seeds
                source = source or f"{_bytes(size)} a run, {run.path.name}"
                break
        else:
            unknown.append(one.label)
    said = f"disk: {_bytes(total)} for {_several(known, 'run')}, by {source}"
    return [said] if known else [], unknown


def _finished(folder: Path) -> list[Run]:
    """Earlier runs, newest last; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = (run for _, run in found_runs.find([folder]).placed if run.state == "finished")
    unique = {run.path: run for run in found}
    return sorted(unique.values(), key=lambda run: run.path.name)


def _tables(folder: Path, suite: str) -> list[pd.DataFrame]:
    frames = []
    for path in sorted(folder.glob(f"{suite}-*.csv")):
        with reading("kernels", path, "a table that padst_exp.bench wrote"):
            frame = pd.read_csv(path, keep_default_na=False)
            for column in ("density_asked", "tokens"):
                frame[column] = pd.to_numeric(frame[column])
            for column in ("p50_ms", "peak_bytes"):
                if column in frame:
                    frame[column] = pd.to_numeric(frame[column], errors="coerce")
        frames.append(frame)
    return frames


def _rows(frame: pd.DataFrame, config: Config) -> pd.DataFrame:
    """The rows of a table of whole models that are about a config."""
    model = nearest_option("model", config["model"])
    structure = structure_label(config["structure"])
    paper = config["dataset"].get("image_size") == 224  # what whole models are measured at
    if not paper or config["model"].get("dim") != _own_dim(model):
        return frame.iloc[:0]
    dense = structure == "dense"
    permutation = nearest_option("permutation", config["permutation"])
    state = "soft" if learned(permutation) else "none" if permutation == "none" else "hard"
    density = 1.0 if dense else 1 - config["sparsity"]
    states = ["none"] if dense else [state] if state == "soft" else ["hard", "none"]
    return frame[
        (frame["case"].str.partition(",")[0] == model) & (frame.structure == structure)
        & frame.scope.isin(["", "all"]) & frame.permutation.isin(states)
        & ((frame.density_asked - density).abs() < 1e-6)
    ]  # fmt: skip


def _own_dim(model: str) -> object:
    """The width of a model as its own file has it, which a recipe for small data changes."""
    path = config_dir() / "model" / f"{model}.yaml"
    return OmegaConf.load(path).model.get("dim") if path.is_file() else None


def _alike(one: Config, other: Config) -> bool:
    """Whether a step of two runs costs about the same."""
    groups = ("model", "dataset", "structure", "permutation", "transform")
    if any(one.get(group) != other.get(group) for group in groups):
        return False
    keys = ("batch_size", "micro_batches", "precision", "compile")
    near = abs(number(one.get("sparsity")) - number(other.get("sparsity"))) < 0.02
    return near and all(_trainer(one).get(key) == _trainer(other).get(key) for key in keys)


def _trainer(config: Config) -> Mapping[str, Any]:
    trainer = config.get("trainer")
    return trainer if isinstance(trainer, Mapping) else {}


def _timing(run: Run) -> Mapping[str, Any]:
    timing = run.summary.get("timing")
    return timing if isinstance(timing, Mapping) else {}


def _device(run: Run) -> str:
    name = run.environment.get("device_name") or run.environment.get("device") or "unknown device"
    threads = run.environment.get("threads")
    on = "" if run.environment.get("device_name") else f", {threads} thread(s)"
    processes = number(run.environment.get("processes"))
    several = f", {processes:.0f} processes" if processes > 1 else ""
    return one_line(f"{name}{on}{several}")


def _size(folder: Path) -> int:
    """Bytes of a run directory; a file of two names counts once."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            state = path.stat()
            found[state.st_dev, state.st_ino] = state.st_size
    return sum(found.values())


def _seeds(wanted: Sequence[Wanted]) -> str:
    counts = sorted({one.seeds for one in wanted})
    *fewer, most = counts
    return " or ".join([*map(str, fewer), _several(most, "seed")])


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _named(labels: Sequence[str], total: int) -> str:
    if len(labels) == total:
        return "any of them"
    shown = ", ".join(labels[:MOST_NAMED])
    more = f" and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else ""
    return f"{_several(len(labels), 'configuration')} ({shown}{more})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    hours = seconds / 3600
    return f"{seconds / 60:.0f} minutes" if hours < 2 else f"{hours:,.1f} hours"


def _bytes(size: float) -> str:
    step = 0 if size < 1 else min(4, int(math.log(size, 1000)))
    return f"{size / 1000**step:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[step]}"
