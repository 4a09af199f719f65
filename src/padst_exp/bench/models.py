"""Suites `model_inference` and `model_train`: whole models, sparse beside dense.

A training step is forward, backward and fused AdamW on data that is on the device already, in
single precision or under autocast; in the soft phase the learner of permutations takes its step too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from padst_exp.bench import choices, contenders
from padst_exp.bench.choices import Model, Sparsity
from padst_exp.bench.floors import Work
from padst_exp.bench.session import Contender, Row, Session
from padst_exp.bench.timing import Call
from padst_exp.config import BenchSchema
from padst_exp.soft import soft_choices

# Seconds of one timing: dense products throttle a GPU's clocks, which takes them a while.
BLOCK = {"cpu": 0.0, "cuda": 0.5}
# Completed share of a training, at which the penalty of soft permutations has its full weight.
PROGRESS = 0.3
# Products of a step for each product of a forward pass: y, dX and dW.
TRAINING = 3
# Structure, density, scope, and state of the permutations.
Kind = tuple[Sparsity, float, str, str]
Forward = Callable[[nn.Module, Tensor], Tensor]


def run(settings: BenchSchema, session: Session) -> Iterator[list[Row]]:
    """Time every model at every batch size; all structures and scopes of one in turn.

    Raises:
        UserError: an unknown model or structure.
    """
    training = settings.suite == "model_train"
    found = kinds(settings, soft=training)
    for model, batch, name in cases(settings, session):
        case = partial(_case, session, model, batch, found, training)
        yield session.tried(name, case)


def cases(settings: BenchSchema, session: Session) -> Iterator[tuple[Model, int, str]]:
    """Every model at every batch size that there is time for, with a name for messages."""
    found = []
    for entry in settings.models or ():
        model, batches = choices.model(entry, settings.images, settings.text), settings.batches
        if isinstance(batches, Mapping):
            batches = batches["text" if model.is_language else "images"]
        found += [(model, batch, f"{model.label} at batch {batch}") for batch in batches or ()]
    for case in session.affordable(settings.suite, found):
        yield case
        session.say(f"{settings.suite}: {case[2]}")


def kinds(settings: BenchSchema, *, soft: bool) -> list[Kind]:
    """Every structure at every density and scope, hard and if wanted soft."""
    densities = [round(1 - sparsity, 6) for sparsity in settings.sparsities or ()]
    structures = [choices.sparsity(entry) for entry in settings.structures or ()]
    every = itertools.product(structures, densities, settings.scopes or ())
    return [(*one, state) for one in every for state in one[0].phases[: 2 if soft else 1]]


def _case(
    session: Session, model: Model, batch: int, found: list[Kind], training: bool
) -> list[Row]:
    """All rows of one model at one batch size; none where no structure is legal."""
    torch.compiler.reset()
    dtype = torch.float32 if training else session.dtype
    packed = None if training else contenders.PACKED_TOKENS
    sides = contenders.dense(session, model, dtype, packed)
    count = len(sides)
    for kind in session.affordable(f"structures of {model.label}", found):
        make = partial(sparse, session, model, batch, kind, dtype)
        made = session.tried(f"{kind[0].label} in {model.label}", lambda make=make: [make()])
        for one in list(made):
            inputs = to_device(session, model.example(batch)[0], dtype)
            export = partial(contenders.exported_model, session, one, inputs)
            if not training:
                made += session.tried(f"{one.name}, exported", lambda make=export: [make()])
        sides += [form for one in made for form in (one, contenders.compiled(one, model))]
    if len(sides) == count:
        return []
    return (_train if training else _infer)(session, model, batch, sides)


def sparse(session: Session, model: Model, batch: int, kind: Kind, dtype: torch.dtype) -> Contender:
    """A sparse model with the backends that the dispatcher takes for `batch` samples.

    Raises:
        UserError: the structure cannot hold that density in a layer of the model.
    """
    structure, density, scope, state = kind
    one = contenders.sparse(
        session, model, structure, density, dtype=dtype, scope=scope, permutation=state
    )
    sample = to_device(session, model.example(1)[0], dtype)

    def forward() -> None:
        with torch.no_grad(), autocast(session, dtype):
            one.modules[0](sample)

    return replace(one, dispatcher=contenders.choose(session, one, forward, batch))


def _infer(session: Session, model: Model, batch: int, sides: list[Contender]) -> list[Row]:
    """Forward passes; those of a language model with all logits, and with the last ones only."""
    inputs = to_device(session, model.example(batch)[0], session.dtype)
    passes: dict[str, Forward] = {"inference": lambda module, inputs: module(inputs)}
    if model.is_language:
        passes = {
            "inference, logits of all positions": passes["inference"],
            "inference, logits of the last position": last_logits,
        }
    rows: list[Row] = []
    for done, (what, forward) in enumerate(passes.items()):
        part = replace(session, budget=session.budget.part(1 / (len(passes) - done)))
        with torch.inference_mode():
            calls = [(one, partial(forward, one.modules[0].eval(), inputs)) for one in sides]
            rows += _compare(part, "model_inference", model, batch, what, forward, calls, 1)
    return rows


def _train(session: Session, model: Model, batch: int, sides: list[Contender]) -> list[Row]:
    calls = [(one, step(session, model, one, batch)[0]) for one in sides]
    forward: Forward = lambda module, inputs: module(inputs)  # noqa: E731
    return _compare(session, "model_train", model, batch, "training step", forward, calls, TRAINING)


def _compare(
    session: Session,
    suite: str,
    model: Model,
    batch: int,
    what: str,
    forward: Forward,
    calls: list[tuple[Contender, Call]],
    products: int,
) -> list[Row]:
    dense = calls[0][0].modules[0]
    dtype = next(dense.parameters()).dtype
    work = Work(dense, forward, to_device(session, model.example(1)[0], dtype))

    def floor(one: Contender, _: object) -> float:
        rules, size = model.rules(one.scope if one.kind == "sparse" else ""), session.dtype.itemsize
        return products * work.floor(session.ceilings, rules, one.density, batch, size)

    size = model.inputs["context_length" if model.is_language else "image_size"]
    case = f"{model.label}, " + (f"context {size}" if model.is_language else f"{size} pixels")
    about: Row = {"suite": suite, "case": case, "tokens": batch, "pass": what}
    graphs = session.device.type == "cuda" and suite == "model_inference"
    return session.compare(
        about, calls, floor=floor, graphs=graphs, block=BLOCK[session.device.type]
    )


def step(
    session: Session, model: Model, one: Contender, batch: int
) -> tuple[Call, list[torch.optim.Optimizer]]:
    """One optimizer step on random data as a call, and the optimizers that take part."""
    module, learner = one.modules[0].train(), one.learner
    soft = soft_choices(module)
    own = {id(choice.logits) for choice in soft.values()}
    weights = [parameter for parameter in module.parameters() if id(parameter) not in own]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    if learner is not None:
        learner.start(soft)
    inputs, targets = (to_device(session, t, torch.float32) for t in model.example(batch))

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        if learner is not None:
            learner.zero_grad()
        with autocast(session, torch.float32):
            output = module(inputs)
            loss = nn.functional.cross_entropy(output.flatten(0, -2), targets.flatten())
        loss.backward()
        if learner is not None:
            learner.step(PROGRESS)
        optimizer.step()

    return call, optimizer


def last_logits(module: nn.Module, tokens: Tensor) -> Tensor:
    """Logits `[B, V]` of the token that follows a prompt `[B, T]`."""
    transformer, head = module.get_submodule("transformer"), module.get_submodule("lm_head")
    logits: Tensor = head(transformer(tokens, use_cache=False).last_hidden_state[:, -1])
    return logits


def autocast(session: Session, dtype: torch.dtype) -> torch.autocast:
    """Autocast to the dtype of the session where weights are wider."""
    lower = session.dtype != torch.float32 and dtype == torch.float32
    return torch.autocast(session.device.type, session.dtype, enabled=lower)


def to_device(session: Session, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs or targets where the model is, in the dtype of its weights."""
    return tensor.to(session.device, dtype if tensor.is_floating_point() else tensor.dtype)
