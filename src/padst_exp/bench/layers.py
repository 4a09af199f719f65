"""Single sparse layers beside dense ones: forward, backward, conversions, peers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from padst_exp.bench import choices, contenders
from padst_exp.bench.choices import Keys, Layer, Sparsity
from padst_exp.bench.session import Call, Contender, Row, Session
from padst_exp.inference.packing import packed_layer
from padst_kernels import Backend

# Up to here a GPU waits for Python, and CUDA graphs help.
GRAPH_TOKENS = 1024
# Products of each kind of pass: y; y, dX and dW.
PASSES = {"forward": 1, "forward+backward": 3}


def run(keys: Keys, session: Session) -> Iterator[pd.DataFrame]:
    """Time every layer at every density and number of tokens.

    Raises:
        UserError: an unknown structure.
    """
    kinds = [kind for entry in keys.structures for kind in choices.sparsities(entry)]
    for sparsity, layer in itertools.product(keys.sparsities, keys.shapes or ()):
        density = round(1 - sparsity, 6)
        # Contenders are made once, for all that is done with them.
        made = _contenders(session, layer, kinds, density)
        if all(one.structure == "dense" for one in made):
            continue  # dense layers alone are nothing to compare
        about: Row = {"suite": keys.suite, "case": layer.label}
        for tokens, what in itertools.product(keys.tokens or (), PASSES):
            name = f"{layer.label}, {tokens} tokens, {what}"
            here = {**about, "tokens": tokens, "pass": what}
            yield from session.tried(name, partial(cell, session, layer, made, here))
        here = {**about, "tokens": 0, "pass": "conversion"}
        yield from session.tried("conversions", partial(_conversions, session, made, here))
        session.say(f"{keys.suite}: {layer.label} at density {density:g}")


def _contenders(
    session: Session, layer: Layer, kinds: Sequence[Sparsity], density: float
) -> list[Contender]:
    """All contenders of a layer; peers where a structure has no permutations."""
    made = contenders.dense(session, layer)
    # A dense convolution needs no patches, so that it can be the fastest way to a sparse one.
    plain: list[Backend] = ["torch"] if layer.kernel else ["torch", "scatter"]
    x = layer.example(5).to(session.device, session.dtype)

    def ours(kind: Sparsity) -> list[Contender]:
        one = contenders.sparse(session, layer, kind, density)
        found = list(contenders.by_backend(session, one, x, plain))
        if kind.permutation == "none" and not layer.kernel:
            found += contenders.peers(session, one, {other.form for other in made})
        return found

    for kind in kinds:
        made += itertools.chain(
            *session.tried(f"{kind.label} in {layer.label}", partial(ours, kind))
        )
    return made


def cell(session: Session, layer: Layer, made: Sequence[Contender], about: Row) -> pd.DataFrame:
    """One kind of pass of all contenders over so many tokens."""
    torch.compiler.reset()  # every cell is a variant, and the number of variants is limited
    tokens, products = about["tokens"], PASSES[about["pass"]]
    forward = products == 1
    x = layer.example(tokens).to(session.device, session.dtype)
    sides = [one for one in made if one.trained or forward]
    if forward and any(one.kind == "strong" for one in made):
        sides.append(contenders.onednn(made[0], tokens))
    least = products * layer.least_seconds(session.ceilings, tokens, session.dtype)
    sides = [replace(one, floor=one.density * least) for one in sides]
    with torch.set_grad_enabled(not forward):
        if forward and session.device.type == "cuda" and tokens <= GRAPH_TOKENS:
            for one in list(sides):
                sides += session.tried(one.form, partial(contenders.captured, one, x))
        return session.compare(about, [(one, _pass(one, x, forward)) for one in sides])


def _pass(one: Contender, x: Tensor, forward: bool) -> Call:
    """One pass by the next module in turn."""
    turns = itertools.cycle(one.modules)
    if forward:
        return lambda: next(turns)(x)
    leaf = x.detach().requires_grad_()
    dy = torch.randn_like(one.modules[0](x))

    def call() -> Sequence[Tensor]:
        module = next(turns)
        return torch.autograd.grad(module(leaf), (leaf, *module.parameters()), dy)

    return call


def _conversions(session: Session, made: Sequence[Contender], about: Row) -> pd.DataFrame:
    """What follows a rewiring: deriving the indices anew; and packing, once, for inference."""
    sides: list[tuple[Contender, Call]] = []
    final: dict[str, Contender] = {}
    for one in made:
        if one.form.startswith("packed") and one.permutation != "soft":
            final.setdefault(one.structure, one)
    for one in final.values():
        sparse = contenders.sparse_layer(one)
        sides.append((replace(one, form="index"), sparse.index))
        sides.append((replace(one, form="export"), partial(packed_layer, sparse)))
    return session.compare(about, sides)
