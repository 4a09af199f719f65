"""Every model at every batch size: what the suites of whole models have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from padst_exp.bench import configurations
from padst_exp.bench.configurations import Model
from padst_exp.bench.keys import BenchSchema
from padst_exp.bench.report import Row
from padst_exp.bench.session import Session
from padst_exp.structures import Structure

# Rows of one model at one batch size: structures, their density, and scopes follow.
Case = Callable[[Session, Model, int, Sequence[Structure], float, Sequence[str]], list[Row]]
# By kind of device, and whether the model is one of language.
Batches = Mapping[str, Mapping[bool, Sequence[int]]]


def each_model(
    settings: BenchSchema,
    session: Session,
    *,
    suite: str,
    case: Case,
    models: Sequence[str],
    batches: Batches,
) -> Iterator[list[Row]]:
    """The rows of every case there is time for; a case that fails has none.

    Args:
        settings: may name models, batches and structures of their own.
        session: says what was done and what was not.
        suite: its name.
        case: measures one.
        models: where `settings` has none.
        batches: where `settings` has none.

    Raises:
        UserError: an unknown model or structure.
    """
    chosen = configurations.models(settings.models or models)
    names = settings.structures or configurations.MODEL_STRUCTURES
    structures = [configurations.structure(name) for name in names]
    cases = [
        (model, batch)
        for model in chosen
        for batch in settings.batches or batches[session.device.type][model.is_language]
    ]
    for model, batch in session.affordable(suite, cases):
        name = f"{model.name} at batch {batch}"
        density, scopes = 1 - settings.sparsity, settings.scopes
        yield session.tried(name, partial(case, session, model, batch, structures, density, scopes))
        session.say(f"{suite}: {name}")
