"""Suite `model_inference`: forward passes of whole models, sparse beside dense."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from padst_exp.bench import models
from padst_exp.bench.configurations import Model, describe
from padst_exp.bench.keys import BenchSchema
from padst_exp.bench.model_cases import each_model
from padst_exp.bench.models import Variant
from padst_exp.bench.report import Line, Row, timing_rows
from padst_exp.bench.session import Session
from padst_exp.bench.timing import Call, captured
from padst_exp.bench.work import Work
from padst_exp.structures import Structure

SUITE = "model_inference"
ROUNDS = 5
MODELS = ["vit", "vit_large", "gpt2", "gpt2_medium"]
BATCHES = {"cpu": {False: [1, 16], True: [1]}, "cuda": {False: [256, 1], True: [16, 1]}}
# Dense products throttle a GPU's clocks, which takes them a while.
BLOCK = {"cpu": 3e-3, "cuda": 0.5}
GRAPH = ", CUDA graph"
Forward = Callable[[nn.Module, Tensor], Tensor]


def run(settings: BenchSchema, session: Session) -> Iterator[list[Row]]:
    """Time every model at every batch size; all structures and scopes of one in turn.

    Raises:
        UserError: an unknown model or structure.
    """
    return each_model(settings, session, suite=SUITE, case=case, models=MODELS, batches=BATCHES)


def case(
    session: Session,
    model: Model,
    batch: int,
    structures: Sequence[Structure],
    density: float,
    scopes: Sequence[str],
) -> list[Row]:
    """All rows of one model at one batch size; none where no structure is legal."""
    torch.compiler.reset()
    example, _ = model.example(batch, torch.Generator().manual_seed(0))
    inputs = models.to_device(session, example, training=False)
    plain = models.dense_variants(session, model, training=False)
    variants = list(plain)
    for structure, scope in itertools.product(structures, scopes):
        if session.budget.left < 0:
            session.say(f"{SUITE}: budget spent, {describe(structure)} in {model.name} left out")
            break
        make = partial(
            models.sparse_variants,
            session, model, structure, density, scope, batch=batch, training=False,
        )  # fmt: skip
        for made in session.tried(f"{describe(structure)} in {model.name}", make):
            made.module.eval()
            variants.append(made)
            if made.form == models.EAGER:
                export = partial(models.exported_variants, session, made, inputs)
                variants += session.tried(f"{made.name}, exported", export)
    if len(variants) == len(plain):
        return []
    rows: list[Row] = []
    passes = _passes(model)
    with torch.inference_mode():
        for done, (what, forward) in enumerate(passes.items()):
            share = session.within(session.budget.part(1 / (len(passes) - done)))
            work = Work(model, plain[0].module, forward, inputs[:1])
            rows += _rows(share, model, batch, what, forward, variants, inputs, work)
    return rows


def _rows(
    session: Session,
    model: Model,
    batch: int,
    what: str,
    forward: Forward,
    variants: Sequence[Variant],
    inputs: Tensor,
    work: Work,
) -> list[Row]:
    """All variants in turn."""
    calls: dict[str, Call] = {}
    lines: dict[str, Line] = {}
    for variant in variants:
        call = _call(variant, forward, inputs)
        forms = {"": call}
        if session.device.type == "cuda":
            forms[GRAPH] = captured(call, session.device)
        for suffix, call in forms.items():
            calls[variant.name + suffix] = call
            floor = work.floor(session, batch, variant.sparse_scope, variant.density)
            lines[variant.name + suffix] = line(model, batch, what, variant, floor, suffix)
    samples, failed = session.alternate(calls, rounds=ROUNDS, block=BLOCK[session.device.type])
    return timing_rows(session, SUITE, lines, samples, failed)


def line(
    model: Model, batch: int, what: str, variant: Variant, floor: float, suffix: str = ""
) -> Line:
    """What a row of a model is about."""
    size = model.inputs["context_length" if model.is_language else "image_size"]
    data = f"context {size}" if model.is_language else f"{size} pixels"
    return Line(
        case=f"{model.name}, {data}",
        tokens=batch,
        what=what,
        structure=variant.structure,
        form=variant.form + suffix,
        scope=variant.scope,
        permutation=variant.permutation,
        density_asked=variant.density_asked,
        density=variant.density,
        side=variant.side,
        floor=floor,
        dispatcher=variant.backends,
    )


def _passes(model: Model) -> dict[str, Forward]:
    """What is computed, by its name in tables."""
    if not model.is_language:
        return {"inference": lambda module, inputs: module(inputs)}
    return {
        "inference, logits of all positions": lambda module, inputs: module(inputs),
        "inference, logits of the last position": _last_logits,
    }


def _last_logits(module: nn.Module, tokens: Tensor) -> Tensor:
    """Logits `[B, V]` of the token that follows a prompt."""
    transformer, head = module.get_submodule("transformer"), module.get_submodule("lm_head")
    hidden = transformer(tokens, use_cache=False).last_hidden_state
    return cast(Tensor, head(hidden[:, -1]))


def _call(variant: Variant, forward: Forward, inputs: Tensor) -> Call:
    module = variant.module.eval()
    return lambda: forward(module, inputs)
