"""Whole models, sparse beside dense: inference, training steps, and what these keep in memory.

A training step is forward, backward and fused AdamW on data that is on the device already, in
single precision or under autocast; in the soft phase the learner of permutations steps too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from padst_exp import dispatch
from padst_exp.bench import choices, contenders
from padst_exp.bench.choices import Keys, Model, Sparsity
from padst_exp.bench.session import Call, Contender, Row, Session
from padst_exp.engine.backends import describe
from padst_exp.soft import soft_choices

# oneDNN packs weights for so many tokens; their order depends on it only where they are few.
PACKED_TOKENS = 4096
# Seconds of one timing: dense products throttle a GPU's clocks, which takes them a while.
BLOCK = {"cpu": 0.0, "cuda": 0.5}
# Completed share of a training, at which the penalty of soft permutations has its full weight.
PROGRESS = 0.3
# Columns of bytes by the names that PyTorch's tracker has for them.
KEPT = {"PARAM": "parameters_bytes", "GRAD": "gradients_bytes", "OPT": "moments_bytes",
        "BUFFER": "indices_bytes"}  # fmt: skip
# A structure, its density, and the scope of what is sparse.
Kind = tuple[Sparsity, float, str]


def run(keys: Keys, session: Session) -> Iterator[pd.DataFrame]:
    """Measure every model at every batch size; all structures and scopes of one in turn.

    Raises:
        UserError: an unknown model or structure.
    """
    models = [
        choices.model(entry, keys.images or {}, keys.text or {}) for entry in keys.models or ()
    ]
    structures = [kind for entry in keys.structures for kind in choices.sparsities(entry)]
    densities = [round(1 - sparsity, 6) for sparsity in keys.sparsities]
    kinds = list(itertools.product(structures, densities, keys.scopes or ()))
    measure = {"inference": _inference, "training": _training, "memory": _memory}[keys.measure]
    for model, batch in itertools.product(models, keys.batches or ()):
        about: Row = {"suite": keys.suite, "case": model.label, "tokens": batch}
        # Without a legal structure there is nothing to compare.
        for rows in session.tried(model.label, partial(measure, session, model, kinds, about)):
            yield from [rows] if (rows.structure != "dense").any() else []
        session.say(f"{keys.suite}: {model.label} at batch {batch}")


def sparse(session: Session, model: Model, batch: int, kind: Kind) -> Contender:
    """A sparse model with the backends that the dispatcher takes for `batch` samples.

    Raises:
        UserError: the structure cannot hold that density in a layer of the model.
    """
    one = contenders.sparse(session, model, *kind)
    module, sample = one.modules[0].eval(), session.inputs(model.example(1)[0])

    def forward() -> None:
        with torch.no_grad(), session.precision():
            module(sample)

    picks = dispatch.choose(module, forward, samples=batch, device=session.device, compiled=False)
    return replace(one, dispatcher=describe(picks).partition(": ")[2])


def _inference(session: Session, model: Model, kinds: Sequence[Kind], about: Row) -> pd.DataFrame:
    """Dense, sparse and exported models, eager and compiled, and on a GPU captured."""
    torch.compiler.reset()
    inputs = session.inputs(model.example(about["tokens"])[0])
    sides = contenders.dense(session, model, PACKED_TOKENS)
    for kind in kinds:
        name = f"{kind[0].label} in {model.label}"
        made = session.tried(name, partial(sparse, session, model, about["tokens"], kind))
        for one in tuple(made):
            made += session.tried(name, partial(contenders.exported_model, one, inputs))
        sides += [form for one in made for form in (one, contenders.compiled(one))]
    with torch.inference_mode():
        for one in tuple(sides):
            one.modules[0].eval()
            if session.device.type == "cuda":
                sides += session.tried(one.form, partial(contenders.captured, one, inputs))
        calls = [(one, partial(one.modules[0], inputs)) for one in sides]
        return session.compare({**about, "pass": "inference"}, calls, BLOCK[session.device.type])


def _training(session: Session, model: Model, kinds: Sequence[Kind], about: Row) -> pd.DataFrame:
    """Steps of dense and sparse models, eager and compiled."""
    torch.compiler.reset()
    batch, sides = about["tokens"], contenders.dense(session, model)
    for kind in kinds:
        make = partial(sparse, session, model, batch, kind)
        for one in session.tried(f"{kind[0].label} in {model.label}", make):
            sides += [one, contenders.compiled(one)]
    calls = [(one, step(session, model, one, batch)[0]) for one in sides]
    return session.compare({**about, "pass": "training step"}, calls, BLOCK[session.device.type])


def step(
    session: Session, model: Model, one: Contender, batch: int
) -> tuple[Call, torch.optim.Optimizer]:
    """One training step on random data as a call, and the optimizer of all but soft choices."""
    module, soft = one.modules[0].train(), soft_choices(one.modules[0])
    own = {id(choice.logits) for choice in soft.values()}
    weights = [parameter for parameter in module.parameters() if id(parameter) not in own]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    one.learner.start(soft)
    inputs, targets = map(session.inputs, model.example(batch))

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        one.learner.zero_grad()
        with session.precision():
            output = module(inputs)
            loss = nn.functional.cross_entropy(output.flatten(0, -2), targets.flatten())
        loss.backward()
        one.learner.step(PROGRESS)
        optimizer.step()

    return call, optimizer


def _memory(session: Session, model: Model, kinds: Sequence[Kind], about: Row) -> pd.DataFrame:
    """Bytes of training steps of every side, the dense one first."""
    batch = about["tokens"]

    def weighed(kind: Kind | None) -> Row:
        if kind is None:
            one = Contender(form="eager", modules=[model.build().to(session.device)])
        else:
            one = sparse(session, model, batch, kind)
        call, optimizer = step(session, model, one, batch)
        return {**about, **one.columns(), **tensor_bytes(one.modules[0], optimizer, call)}

    rows = [weighed(None)]
    for kind in kinds:
        rows += session.tried(f"{kind[0].label} in {model.label}", partial(weighed, kind))
    frame = pd.DataFrame(rows)
    for what in ("kept", "peak"):
        frame[f"{what}_share"] = (frame[f"{what}_bytes"] / frame[f"{what}_bytes"][0]).round(4)
    return frame.assign(**session.columns)


def tensor_bytes(module: nn.Module, optimizer: torch.optim.Optimizer, step: Call) -> Row:
    """Bytes of tensors that training steps keep, in all and by kind, and of those alive at most.

    Storage counts once, however many tensors share it.
    """
    tracker = MemTracker()
    tracker.track_external(module, optimizer)
    with tracker:
        step()  # makes what the next one meets
        tracker.reset_mod_stats()
        step()
        (kept,), (peak,) = (
            tracker.get_tracker_snapshot(when).values() for when in ("current", "peak")
        )
    kinds = {str(kind).rpartition(".")[2]: size for kind, size in kept.items()}
    parts = {column: kinds[kind] for kind, column in KEPT.items()}
    return {**parts, "kept_bytes": sum(parts.values()), "peak_bytes": peak["Total"]}
