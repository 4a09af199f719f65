"""What came out of a run, computed from its metrics, its report and its model."""

import math
import resource
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal

import torch
from torch import nn

from padst_exp.dst import Gate
from padst_exp.engine.distributed import World
from padst_exp.engine.efficiency import Efficiency
from padst_exp.engine.tracker import TopologyTracker
from padst_exp.layers import sparse_layers, sparse_weights
from padst_exp.permutations import distance_to_identity
from padst_exp.pools import Symmetry
from padst_exp.soft import soft_choices
from padst_exp.sparsify import Report

Row = Mapping[str, Any]


def summarize(
    rows: Sequence[Row],
    *,
    report: Report,
    model: nn.Module,
    tracker: TopologyTracker,
    baselines: Mapping[str, float],
    monitor: tuple[str, str],
    world: World,
    seconds: float,
    efficiency: Efficiency,
) -> dict[str, Any]:
    """Return the contents of `summary.json`.

    Args:
        rows: of `metrics.jsonl`, from the first step to the last, across resumptions.
        report: of the sparsification.
        model: trained.
        tracker: of its topologies.
        baselines: to compare with.
        monitor: the watched metric and whether "max" or "min" of it is best.
        world: for the device.
        seconds: that this process has run.
        efficiency: what a step took.
    """
    evaluations = list(_of(rows, "eval"))
    name, direction = monitor
    # Where there is an average of the weights, it is what is watched.
    watched = f"ema_{name}" if f"ema_{name}" in evaluations[-1] else name
    soft = soft_choices(model).keys()
    gates = {name for name in soft if isinstance(model.get_submodule(name), Gate)}
    choose = max if direction == "max" else min
    sound = [row for row in evaluations if not math.isnan(row[watched])]
    best = choose(sound or evaluations, key=lambda row: row[watched])
    return {
        "steps": evaluations[-1]["step"],
        "monitor": watched,
        "best": _values(best),
        "final": _values(evaluations[-1]),
        # A run may reach its end and be worth nothing.
        "not_finite": not_finite(evaluations[-1]),
        "baselines": dict(baselines),
        "density_of_layers": report.density("layers"),
        "density_of_model": report.density("model"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "topology": _topology(rows, model, tracker),
        # Modulo what the structure cannot tell apart; a distance of 0 is the identity.
        "permutations": _choices(rows, "permutation", soft - gates)
        | {"distance_to_identity": distances(model)},
        "selections": _choices(rows, "selection", gates),
        "sparsification": report.to_dict(),
        "timing": _timing(rows, world, seconds, efficiency),
    }


def not_finite(row: Row) -> list[str]:
    """The metrics in a row that are NaN or infinite."""
    return [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]


def _topology(rows: Sequence[Row], model: nn.Module, tracker: TopologyTracker) -> dict[str, object]:
    updates = list(_of(rows, "rewire"))
    weights = sparse_weights(model)
    explored = {name: tracker.explored(name, weight) for name, weight in weights.items()}
    return {
        "updates": tracker.updates,
        "units_replaced": sum(tracker.replaced.values()),
        "mean_churn": statistics.fmean(row["churn"] for row in updates) if updates else 0.0,
        "explored": statistics.fmean(explored.values()) if explored else None,
        "explored_of_layer": explored,
        "replaced_in_layer": dict(tracker.replaced),
    }


def _choices(
    rows: Sequence[Row], of: Literal["permutation", "selection"], soft: Set[str]
) -> dict[str, object]:
    """What became of the choices of one kind, `soft` the names of those that still are."""
    hardened = [_values(row) for row in _of(rows, "harden") if row["of"] == of]
    jumps = [row["loss_after"] - row["loss_before"] for row in hardened]
    return {
        "hardened": len(hardened),
        "forced": sum(row["reason"] == "deadline" for row in hardened),
        "still_soft": sorted(soft),
        "median_loss_jump": statistics.median(jumps) if jumps else None,
        "largest_loss_jump": max(jumps) if jumps else None,
        "penalty_curve": _penalty_curve(rows, {*soft, *(row["choice"] for row in hardened)}),
        "events": hardened,
    }


def _penalty_curve(rows: Sequence[Row], names: Set[str]) -> list[dict[str, float]]:
    """Least, mean and largest penalty of these soft choices, at no more than 100 steps."""
    logged = [
        (row["step"], [value for name, value in row["penalty"].items() if name in names])
        for row in _of(rows, "soft")
    ]
    logged = [(step, penalties) for step, penalties in logged if penalties]
    return [
        {
            "step": step,
            "least": min(penalties),
            "mean": statistics.fmean(penalties),
            "largest": max(penalties),
        }
        for step, penalties in logged[:: max(1, -(-len(logged) // 100))]
    ]


def distances(model: nn.Module) -> dict[str, float]:
    """Return, for each hard permutation, its distance to the identity, modulo symmetries."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for layer in sparse_layers(model).values():
        for (side, part), permutation in layer.permutations().items():
            if permutation.soft:
                continue
            # All weights of a layer share the permutation of its inputs.
            moved = layer.parts() if side == "in" else [layer.parts()[part]]
            seen = [weight.geometry.symmetry(side) for weight in moved]
            if side == "in":
                seen = [one.of_channels(layer.taps) for one in seen]
            symmetry = Symmetry.of_all(seen)
            name = names[id(permutation)]
            found[name] = distance_to_identity(permutation.index, symmetry)
    return found


def _timing(
    rows: Sequence[Row], world: World, seconds: float, efficiency: Efficiency
) -> dict[str, object]:
    training = list(_of(rows, "train"))
    # ru_maxrss is in bytes on macOS, in kilobytes elsewhere.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    timing: dict[str, object] = {
        "seconds": seconds,
        "device": str(world.device),
        "processes": world.size,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
    }
    for key in ("samples_per_second", "tokens_per_second"):
        if training and key in training[0]:
            timing[key] = statistics.median(row[key] for row in training)
    told = [row for row in training if "input_wait_share" in row]
    if told:
        waited = sum(row["input_wait_share"] * row["seconds"] for row in told)
        timing["input_wait_share"] = waited / sum(row["seconds"] for row in told)
    speed = timing.get("samples_per_second")
    assert speed is None or isinstance(speed, float)
    timing |= efficiency.timing(speed, world.size)
    if world.device.type == "cuda":
        timing["peak_device_memory_mb"] = torch.cuda.max_memory_allocated(world.device) / 2**20
    return timing


def _of(rows: Iterable[Row], kind: str) -> Iterable[Row]:
    return (row for row in rows if row["kind"] == kind)


def _values(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "kind"}
