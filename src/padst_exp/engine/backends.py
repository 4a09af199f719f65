"""Which backend computes each sparse layer of a training, and how to say so."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from padst_exp import dispatch
from padst_exp.data.sampler import validation_loader
from padst_exp.dispatch import Pick
from padst_exp.engine.checkpoint import random_state, restore_random_state
from padst_exp.engine.distributed import World
from padst_exp.engine.evaluation import forward_context, to_device
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.step import eagerly
from padst_exp.layers import sparse_layers


def choose_backends(
    experiment: Experiment, *, world: World, saved: Mapping[str, Any] | None
) -> dict[str, Pick]:
    """Decide for every sparse layer, the same on every rank, before anything is compiled.

    Args:
        experiment: its model is on its device and in its dtype; only its backends change.
            Backend "auto" takes over what the checkpoint holds, else measures on one sample of
            the data; others are forced.
        world: of this process.
        saved: what the checkpoint holds of the run that is continued; taken over on a device of
            the same model, so that a resumed run computes what it would have computed.

    Raises:
        UserError: the backend needs another device.
    """
    # Rank 0 alone decides: the devices of others may differ.
    picks = None
    if world.main:
        if experiment.backend != "auto":
            picks = dispatch.forced(experiment.model, experiment.backend, world.device)
        else:
            picks = dispatch.restore(saved, experiment.model, world.device)
            picks = _measure(experiment, world) if picks is None else picks
    picks = world.from_main(picks)
    assert picks is not None
    dispatch.reuse(experiment.model, picks)
    return picks


def octaves(model: nn.Module) -> dict[str, int]:
    """By which power of two each sparse layer has fewer values than a dense one, by name.

    Where it changes, what was fastest need not be so any more.
    """
    found = {}
    for name, layer in sparse_layers(model).items():
        dense = sum(math.prod(weight.shape) for weight in layer.parts())
        found[name] = round(math.log2(dense / sum(w.values.numel() for w in layer.parts())))
    return found


def choose_again(
    experiment: Experiment, *, world: World, kept: Mapping[str, Pick]
) -> dict[str, Pick]:
    """Measure all layers but those that keep their picks, and let each use what it gets.

    Global generators are left as they are.
    """
    picks = None
    if world.main:
        before = random_state()
        with eagerly(experiment.trainer.compile):
            picks = _measure(experiment, world, kept)
        restore_random_state(before)
    picks = world.from_main(picks)
    assert picks is not None
    dispatch.reuse(experiment.model, picks)
    return picks


def _measure(
    experiment: Experiment, world: World, kept: Mapping[str, Pick] | None = None
) -> dict[str, Pick]:
    model, trainer = experiment.model, experiment.trainer

    @torch.no_grad()
    def one_sample() -> None:
        batches = validation_loader(experiment.task, batch_size=1, rank=0, world_size=1, workers=0)
        inputs, _ = to_device(next(iter(batches)), world.device, trainer.precision)
        model.eval()
        with forward_context(trainer.precision, world.device):
            model(inputs)
        model.train()

    return dispatch.choose(
        model,
        one_sample,
        samples=trainer.micro_batch_size(world.size),
        device=world.device,
        compiled=trainer.compile,
        kept=kept,
    )


def describe(picks: Mapping[str, Pick]) -> str:
    """One line: how many layers each backend computes, and how fast beside dense ones."""
    groups: dict[str, list[Pick]] = defaultdict(list)
    called = {name: pick for name, pick in picks.items() if pick.tokens}
    for pick in (called or picks).values():
        groups[pick.backend].append(pick)
    parts = []
    for backend, group in groups.items():
        speedups = [pick.speedup for pick in group if pick.speedup is not None]
        measured = f" ({statistics.median(speedups):.2f}x dense)" if speedups else ""
        slower = [speedup for speedup in speedups if speedup < 1]
        if slower:
            measured += f", {len(slower)} of them slower than dense (down to {min(slower):.2f}x)"
        parts.append(f"{len(group)} by {backend}{measured}")
    if called and (others := len(picks) - len(called)):
        parts.append(f"{others} not called (as in attention, which reads weights)")
    return "sparse layers, forward and backward: " + ", ".join(parts)


def summarize_backends(picks: Mapping[str, Pick]) -> dict[str, object]:
    """Plain data for `summary.json`: what computed which layer, and how fast beside dense."""
    return {
        name: {
            "backend": pick.backend,
            "tokens": pick.tokens,
            "dtype": pick.dtype,
            "speedup_over_dense": pick.speedup,
        }
        for name, pick in picks.items()
    }
