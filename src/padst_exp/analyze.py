"""Analyse a run: `python -m padst_exp.analyze run=<folder> [parts=[cost,...]]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig

from padst_exp.atomic import replace_text
from padst_exp.cli import command_line
from padst_exp.config import Device, read_keys
from padst_exp.engine.records import to_json
from padst_exp.errors import UserError
from padst_exp.files import require_no_link

if TYPE_CHECKING:  # the command line must answer --help before torch is imported
    from torch import nn

    from padst_exp.engine.distributed import World
    from padst_exp.restore import RestoredRun

Part = Literal["cost", "spectrum", "paths", "topology", "permutations"]
Results = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AnalyzeSchema:
    """The keys of conf/analyze.yaml.

    Args:
        run: run directory, as printed at the end of a training, or a checkpoint file.
        out: folder to write; null is `analysis` beside the checkpoints.
        parts: what to look at.
        device: "auto" takes the GPU where there is one.
        trust: packages other than ours whose constructors the run's config may name.
        changes: of keys of the run that change no weight, as on a command line, which may also
            have them directly: `dataset.root=/where/the/data/are/now`.
    """

    run: str
    out: str | None
    parts: tuple[Part, ...]
    device: Device
    trust: str | tuple[str, ...]
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """A model at one time of its training.

    Args:
        step: completed steps.
        model: as it was then; the same object each time.
        explored: share of its units that have ever been active, by weight.
    """

    step: int
    model: nn.Module
    explored: dict[str, float]


@command_line("analyze", of_run=True)
def main(cfg: DictConfig) -> None:
    """Analyse a run and say what came out."""
    keys = read_keys(cfg, AnalyzeSchema)

    from padst_exp.engine import distributed
    from padst_exp.messages import say

    world = distributed.start(keys.device)
    try:
        folder, results = analyze(keys, world)
    finally:
        world.close()
    for line in summary(results):
        say(line)
    say(f"{', '.join(sorted(path.name for path in folder.iterdir()))} in {folder}")


def analyze(keys: AnalyzeSchema, world: World) -> tuple[Path, Results]:
    """Analyse a run as `keys` say.

    Returns:
        The folder, which holds `analysis.json` and a picture of each part, and the results.

    Raises:
        UserError: there is no such run, it is damaged, nothing in it is sparse, or the folder
            cannot be written.
    """
    from padst_exp.analysis import figures
    from padst_exp.restore import restore_run

    if world.size > 1:
        raise UserError(f"analyze: one process is enough, torchrun started {world.size}")
    restored = restore_run(Path(keys.run), world, trust=keys.trust, changes=keys.changes)
    if not restored.report.model_layers:
        raise UserError(f"run: expected one with sparse layers, {restored.path} has none")
    folder = _home(restored) / "analysis"
    if keys.out is None:
        require_no_link("out", folder)
    else:
        folder = Path(keys.out)
    results: Results = {"run": str(restored.path), "step": restored.step}
    if "cost" in keys.parts:
        results["cost"] = _cost(restored)
    over_time = {"spectrum": _spectrum, "paths": _paths, "permutations": _permutations}
    wanted = {part: look for part, look in over_time.items() if part in keys.parts}
    history: Results = {part: [] for part in wanted}
    explored: list[Results] = []
    for snapshot in _snapshots(restored, world):
        for part, look in wanted.items():
            history[part].append({"step": snapshot.step, **look(snapshot.model)})
        explored.append({"step": snapshot.step, "explored": snapshot.explored})
    results.update(history)
    if "topology" in keys.parts:
        results["topology"] = {"explored": explored, "changes": _changes(restored)}
    try:
        replace_text(folder / "analysis.json", to_json(results, indent=1))
        for part in keys.parts:
            figures.DRAW[part](results[part], folder / f"{part}.png")
    except OSError as error:
        what = f"{folder} ({error.strerror})"
        raise UserError(f"out: expected a folder that can be written, got {what}") from error
    return folder, results


def summary(results: Results) -> Iterator[str]:
    """What is worth a line on the screen."""
    if "cost" in results:
        cost = results["cost"]
        yield (
            f"a forward pass of one sample: {cost['flops']:.4g} FLOPs, "
            f"{cost['flops'] / cost['dense']['flops']:.3f} of the dense model's; "
            f"{cost['bytes']:.4g} bytes, {cost['bytes'] / cost['dense']['bytes']:.3f} of its"
        )
    if "spectrum" in results:
        last = results["spectrum"][-1]["mean"]
        yield "means over masks: " + ", ".join(
            f"{name} {value:.4g}" for name, value in last.items() if value is not None
        )
    if "paths" in results:
        last = results["paths"][-1]
        for name in ("trained", "unpermuted", "random"):
            after = last[name][min(2, len(last[name]) - 1)]
            yield (
                f"{name} masks: {after['reach']:.1%} of pairs reached after {after['layers']}, "
                f"s2/s1 {after['ratio']:.3f}"
            )
    if "topology" in results:
        explored = results["topology"]["explored"][-1]["explored"]
        yield f"{sum(explored.values()) / len(explored):.1%} of the units explored"
    if "permutations" in results:
        distances = results["permutations"][-1]["distance"]
        if distances:
            mean = sum(distances.values()) / len(distances)
            yield f"permutations move {mean:.1%} of their features, modulo symmetries"


def _home(restored: RestoredRun) -> Path:
    return restored.path.parent if restored.run is None else restored.run


def _snapshots(restored: RestoredRun, world: World) -> Iterator[Snapshot]:
    """The model before training, then at each checkpoint that is left, in order."""
    from padst_exp.engine import checkpoint
    from padst_exp.layers import sparse_weights
    from padst_exp.train import build_experiment

    model = build_experiment(restored.config, world).model.to(world.device)
    weights = sparse_weights(model)
    units = {name: int(weight.geometry.candidates.sum()) for name, weight in weights.items()}
    start = {name: len(weight.active) / units[name] for name, weight in weights.items()}
    yield Snapshot(0, model, start)
    seen_steps = {0}
    files = [restored.path]
    if restored.run is not None:
        files = sorted((restored.run / "checkpoints").glob("*.pt"))
    saved = [(checkpoint.read(path), path) for path in files]
    for state, path in sorted(saved, key=lambda item: int(item[0]["step"])):
        if state["step"] in seen_steps:
            continue
        seen_steps.add(state["step"])
        checkpoint.load_weights(model, state["model"], path)
        seen = state["topology"]["seen"]
        explored = {name: int(seen[name].sum()) / units[name] for name in weights}
        yield Snapshot(state["step"], model, explored)


def _cost(restored: RestoredRun) -> Results:
    """FLOPs and bytes by kind, of the model and of the dense one that it came from."""
    from padst_exp.analysis.cost import count
    from padst_exp.sparsify import output_layer
    from padst_exp.train import original
    from padst_exp.transforms import example

    inputs = example(restored.task.model_shape)
    dense = original(restored.config, restored.task).build({})
    there = inputs.to(next(restored.model.parameters()).device)
    counted = {"dense": (dense, inputs), "sparse": (restored.model, there)}
    results: Results = {}
    for name, (model, sample) in counted.items():
        costs = count(model, sample)
        head = output_layer(model)
        heads = {n for n, module in model.named_modules() if module is head}
        kinds: dict[str, list[int]] = {kind: list(pair) for kind, pair in costs.by_kind().items()}
        products = [row for row in costs.rows if row.kind == "product" and row.module in heads]
        if products:
            part = [sum(row.flops for row in products), sum(row.bytes for row in products)]
            kinds["head"] = part
            kinds["product"] = [a - b for a, b in zip(kinds["product"], part, strict=True)]
        results[name] = {"flops": costs.flops, "bytes": costs.bytes, "kinds": kinds}
    modules = [asdict(row) for row in count(restored.model, there).rows]
    return {**results["sparse"], "dense": results["dense"], "modules": modules}


def _spectrum(model: nn.Module) -> Results:
    from padst_exp.analysis.masks import mask
    from padst_exp.analysis.spectrum import spectrum
    from padst_exp.layers import sparse_weights

    each = {
        name: asdict(spectrum(mask(weight), weight.matrix()))
        for name, weight in sparse_weights(model).items()
    }
    names = ("gap", "imdb", "weighted_gap", "imsg")
    return {"mean": {name: _mean([row[name] for row in each.values()]) for name in names}, **each}


def _paths(model: nn.Module) -> Results:
    from padst_exp.analysis.masks import consecutive
    from padst_exp.analysis.paths import mixing, shuffled
    from padst_exp.seeds import stream

    chain = consecutive(model)
    masks = {
        "trained": list(chain.values()),
        "unpermuted": list(consecutive(model, permuted=False).values()),
        "random": shuffled(chain.values(), stream("paths")),
    }
    rows = {name: [asdict(row) for row in mixing(each)] for name, each in masks.items()}
    return {"layers": list(chain), **rows}


def _permutations(model: nn.Module) -> Results:
    from padst_exp.engine.summary import distances
    from padst_exp.layers import permutations

    moved = {
        name: float((permutation.nearest() != permutation.initial).double().mean())
        for name, permutation in permutations(model).items()
    }
    return {"distance": distances(model), "moved_since_start": moved}


def _changes(restored: RestoredRun) -> list[Results]:
    """Steps at which topologies changed, and by how much."""
    from padst_exp.engine.records import read_metrics

    rows = [] if restored.run is None else read_metrics(restored.run / "metrics.jsonl")
    keys = ("step", "churn", "density")
    changes = [{key: row.get(key) for key in keys} for row in rows if row.get("kind") == "rewire"]
    numbers = int | float
    return [row for row in changes if all(isinstance(value, numbers) for value in row.values())]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


if __name__ == "__main__":
    main()
