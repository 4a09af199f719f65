"""Suite `model_train`: one training step of whole models, in the soft phase and after hardening.

A step is forward, backward and fused AdamW on data that is on the device already; in the soft
phase also the penalty of the soft permutations, their own optimizer and their projection.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from padst_exp.bench import models
from padst_exp.bench.configurations import Model, describe
from padst_exp.bench.keys import BenchSchema
from padst_exp.bench.model_cases import each_model
from padst_exp.bench.model_inference import line
from padst_exp.bench.models import Variant, phases
from padst_exp.bench.report import Row, timing_rows
from padst_exp.bench.session import Session
from padst_exp.bench.timing import Call
from padst_exp.bench.work import Work
from padst_exp.layers import permutations
from padst_exp.structures import Structure

SUITE = "model_train"
ROUNDS = 5
MODELS = ["vit", "gpt2"]
BATCHES = {"cpu": {False: [16], True: [1]}, "cuda": {False: [256], True: [16]}}
BLOCK = {"cpu": 3e-3, "cuda": 0.5}
# Of training; the penalty of soft permutations has its full weight by then.
PROGRESS = 0.3


def run(settings: BenchSchema, session: Session) -> Iterator[list[Row]]:
    """Time a step of every model; all structures, scopes and phases of one in turn.

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
    """All rows of one model at one batch size; none where no structure is legal.

    The soft phase is that of the first structure.
    """
    torch.compiler.reset()
    plain = models.dense_variants(session, model, training=True)
    variants = list(plain)
    kinds = [(structures[0], *kind) for kind in itertools.product(scopes, phases(structures[0]))]
    kinds += [(*kind, False) for kind in itertools.product(structures[1:], scopes)]
    for structure, scope, soft in kinds:
        if session.budget.left < 0:
            session.say(f"{SUITE}: budget spent, {describe(structure)} in {model.name} left out")
            break
        make = partial(
            models.sparse_variants,
            session, model, structure, density, scope, batch=batch, training=True, soft=soft,
        )  # fmt: skip
        variants += session.tried(f"{describe(structure)} in {model.name}", make)
    if len(variants) == len(plain):
        return []
    calls = {variant.name: step(session, model, variant, batch) for variant in variants}
    inputs, _ = model.example(1, torch.Generator().manual_seed(0))
    inputs = models.to_device(session, inputs, training=True)
    work = Work(model, plain[0].module, lambda module, x: module(x), inputs)
    lines = {}
    for v in variants:
        floor = work.floor(session, batch, v.sparse_scope, v.density, training=True)
        lines[v.name] = line(model, batch, "training step", v, floor)
    samples, failed = session.alternate(calls, rounds=ROUNDS, block=BLOCK[session.device.type])
    return timing_rows(session, SUITE, lines, samples, failed)


def step(
    session: Session,
    model: Model,
    variant: Variant,
    batch: int,
    optimizers: list[torch.optim.Optimizer] | None = None,
) -> Call:
    """One optimizer step on random data; `optimizers` receives those that take part."""
    module, learner = variant.module.train(), variant.learner
    soft = [permutation for permutation in permutations(module).values() if permutation.soft]
    logits = [p.logits for p in soft if p.logits is not None]
    own = {id(parameter) for parameter in logits}
    weights = [parameter for parameter in module.parameters() if id(parameter) not in own]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    soft_optimizer = learner.optimizer(logits) if learner is not None and logits else None
    if optimizers is not None:
        optimizers += [optimizer, *([] if soft_optimizer is None else [soft_optimizer])]
    inputs, targets = (
        models.to_device(session, tensor, training=True)
        for tensor in model.example(batch, torch.Generator().manual_seed(0))
    )

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        if soft_optimizer is not None:
            soft_optimizer.zero_grad(set_to_none=True)
        with models.forward_context(session, training=True):
            loss = _loss(module, inputs, targets)
        loss.backward()
        if soft_optimizer is not None and learner is not None:
            learner.regularize(soft, PROGRESS)
        optimizer.step()
        if soft_optimizer is not None and learner is not None:
            soft_optimizer.step()
            learner.project(soft)

    return call


def _loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = module(inputs)
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
