"""Suite `layers`: single sparse layers, their permutations and conversions, beside dense ones."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from padst_exp.bench import choices, contenders
from padst_exp.bench.choices import Layer, Sparsity
from padst_exp.bench.floors import bytes_twin
from padst_exp.bench.session import Contender, Row, Session
from padst_exp.bench.timing import Call, captured
from padst_exp.config import BenchSchema
from padst_exp.inference.packing import packed_layer

# Up to here a GPU waits for Python, and CUDA graphs help; with more, gradients are told apart.
GRAPH_TOKENS = 1024
PASSES = {
    "forward": ("forward",),
    "forward+backward": ("forward", "dX", "dW"),
    "dX": ("dX",),
    "dW": ("dW",),
}


def run(settings: BenchSchema, session: Session) -> Iterator[list[Row]]:
    """Time every layer at every density and number of tokens.

    Raises:
        UserError: an unknown shape or structure.
    """
    kinds = [choices.sparsity(entry) for entry in settings.structures or ()]
    densities = [round(1 - sparsity, 6) for sparsity in settings.sparsities or ()]
    layers = choices.layers(settings.shapes or ())
    on_gpu = session.device.type == "cuda"
    cells = [
        (density, layer, tokens, what)
        for density, layer in itertools.product(densities, layers)
        for tokens, what in itertools.product(settings.tokens or (), PASSES)
        if what in ("forward", "forward+backward") or (on_gpu and tokens > GRAPH_TOKENS)
    ]
    # Contenders of a layer are made once, for all that is done with them.
    groups = itertools.groupby(session.affordable("layers", cells), key=lambda cell: cell[:2])
    for (density, layer), group in groups:
        made = _contenders(session, layer, kinds, density, first=density == densities[0])
        if all(one.kind != "sparse" for one in made):
            continue  # dense layers alone are nothing to compare
        for _, _, tokens, what in group:
            name = f"{layer.label}, {tokens} tokens, {what}"
            yield session.tried(name, partial(_cell, session, layer, made, tokens, what))
        yield session.tried("conversions", partial(_conversions, session, layer, made))
        session.say(f"layers: {layer.label} at density {density:g}")


def _contenders(
    session: Session, layer: Layer, kinds: Sequence[Sparsity], density: float, *, first: bool
) -> list[Contender]:
    """All contenders of a layer; at the first density also what permutations cost, and 2:4."""
    made = contenders.dense(session, layer, session.dtype)

    def sparse(kind: Sparsity, permutation: str) -> list[Contender]:
        one = contenders.sparse(session, layer, kind, density, permutation=permutation)
        return list(contenders.by_backend(session, one))

    def peers(kind: Sparsity) -> list[Contender]:
        one = contenders.sparse(session, layer, kind, density, permutation="none")
        return list(contenders.peers(session, one, {other.form for other in made}))

    for kind in kinds:
        states = [kind.phases[0]]
        if first:
            # The others say what a permutation costs: none, and, for one structure, a soft one.
            states = [*kind.phases[: 2 if kind is kinds[0] else 1], "none"]
        for state in dict.fromkeys(states):
            name = f"{kind.label} in {layer.label}"
            made += session.tried(name, partial(sparse, kind, state))
        made += session.tried(f"peers of {kind.label}", partial(peers, kind))
    if first:
        made += session.tried("2:4", lambda: [contenders.two_of_four(session, layer)])
    return made


def _cell(
    session: Session, layer: Layer, made: Sequence[Contender], tokens: int, what: str
) -> list[Row]:
    """One kind of pass of all contenders over so many tokens."""
    torch.compiler.reset()  # every cell is a variant, and the number of variants is limited
    forward, passes = what == "forward", PASSES[what]
    sides = [one for one in made if (one.trained or forward) and tokens <= one.most_tokens]
    if forward:
        strong = [one for one in sides if one.kind == "strong"]
        sides += [contenders.onednn(sides[0], layer, tokens) for _ in strong]
    x, dy = session.random(tokens, layer.in_features), session.random(tokens, layer.out_features)
    graphs = session.device.type == "cuda" and tokens <= GRAPH_TOKENS
    entries = layer.in_features * layer.out_features

    def twin(density: float) -> Call:
        size = session.dtype.itemsize
        weight = round(density * entries) * size
        call = bytes_twin(x.numel() * size, dy.numel() * size, weight, passes, session.device)
        return captured(call, session.device, 1) if graphs else call

    twins = {f"bytes twin {d:g}": twin(d) for d in {one.density_asked for one in sides}}

    def floor(one: Contender, samples: Mapping[str, list[float]]) -> float:
        moved = float(np.median(samples[f"bytes twin {one.density_asked:g}"]))
        return max(moved, 2 * tokens * one.density * entries * len(passes) / session.ceilings.rate)

    about: Row = {"suite": "layers", "case": layer.label, "tokens": tokens, "pass": what}
    with torch.set_grad_enabled(not forward):
        calls = [(one, _pass(one, x, dy, what)) for one in sides]
        rows = session.compare(about, calls, floor=floor, twins=twins, graphs=graphs)
    chosen = {name: _trained_by(session, one, tokens) for name, one in _first(sides).items()}
    for row in rows:
        if str(row["form"]).startswith("packed"):
            row["dispatcher"] = chosen.get(str(row["structure"]), "")
    return rows


def _first(sides: Sequence[Contender]) -> dict[str, Contender]:
    """The layer that training ends with, for each structure."""
    packed = [one for one in sides if one.form.startswith("packed") and one.permutation != "soft"]
    return {one.structure: one for one in reversed(packed)}


def _pass(one: Contender, x: Tensor, dy: Tensor, what: str) -> Call:
    """One pass by the next module in turn."""
    turns = itertools.cycle(one.modules)
    if what == "forward":
        return lambda: next(turns)(x)
    leaf = x.detach().requires_grad_(what != "dW")
    for module in one.modules:
        module.requires_grad_(what != "dX")

    def graph(module: nn.Module) -> tuple[Tensor, list[Tensor]]:
        wanted = [tensor for tensor in (leaf, *module.parameters()) if tensor.requires_grad]
        return module(leaf), wanted

    if what == "forward+backward":

        def both() -> Sequence[Tensor]:
            y, wanted = graph(next(turns))
            return torch.autograd.grad(y, wanted, dy)

        return both

    @functools.cache
    def graphs() -> Iterator[tuple[Tensor, list[Tensor]]]:
        # So many tokens leave nothing of a weight in the cache; two modules are enough.
        return itertools.cycle([graph(module) for module in one.modules[:2]])

    def gradient() -> Sequence[Tensor]:
        y, wanted = next(graphs())
        return torch.autograd.grad(y, wanted, dy, retain_graph=True)

    return gradient


def _trained_by(session: Session, one: Contender, tokens: int) -> str:
    """What the dispatcher would train a layer with so many tokens by."""
    if session.budget.left < 0:
        return ""
    layer = copy.deepcopy(one.modules[0])
    x = session.random(1, contenders.sparse_layer(one).in_features)
    alone = replace(one, modules=[layer])
    choose = partial(contenders.choose, session, alone, partial(layer, x), tokens)
    return "".join(session.tried("the dispatcher", lambda: [choose()]))


def _conversions(session: Session, layer: Layer, made: Sequence[Contender]) -> list[Row]:
    """What follows a rewiring: deriving the indices anew; and packing, once, for inference."""
    sides: list[tuple[Contender, Call]] = []
    for one in _first(made).values():
        sparse = contenders.sparse_layer(one)
        sides.append((replace(one, form="index"), sparse.index))
        sides.append((replace(one, form="export"), partial(packed_layer, sparse)))
    about: Row = {"suite": "layers", "case": layer.label, "tokens": 0, "pass": "conversion"}
    return session.compare(about, sides)
