"""Suite `layers`: single sparse layers, their permutations and conversions, beside dense ones."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from padst_exp.bench import choices, contenders
from padst_exp.bench.choices import Layer, Sparsity
from padst_exp.bench.floors import bytes_twin
from padst_exp.bench.keys import Keys
from padst_exp.bench.session import Contender, Row, Samples, Session
from padst_exp.bench.timing import Call, captured
from padst_exp.inference.packing import packed_layer

# Up to here a GPU waits for Python, and CUDA graphs help.
GRAPH_TOKENS = 1024
PASSES = {"forward": ("forward",), "forward+backward": ("forward", "dX", "dW")}


def run(keys: Keys, session: Session) -> Iterator[list[Row]]:
    """Time every layer at every density and number of tokens.

    Raises:
        UserError: an unknown shape or structure.
    """
    kinds = [choices.sparsity(entry) for entry in keys.structures or ()]
    densities = [round(1 - sparsity, 6) for sparsity in keys.sparsities or ()]
    layers, tokens = choices.layers(keys.shapes or ()), keys.tokens or ()
    cells = list(itertools.product(densities, layers, tokens, PASSES))
    # Contenders of a layer are made once, for all that is done with them.
    groups = itertools.groupby(session.affordable("layers", cells), key=lambda cell: cell[:2])
    for (density, layer), group in groups:
        made = _contenders(session, layer, kinds, density, first=density == densities[0])
        if not _trained(made):
            continue  # dense layers alone are nothing to compare
        for _, _, count, what in group:
            name = f"{layer.label}, {count} tokens, {what}"
            yield from session.tried(name, partial(_cell, session, layer, made, count, what))
        yield from session.tried("conversions", partial(_conversions, session, layer, made))
        session.say(f"layers: {layer.label} at density {density:g}")


def _contenders(
    session: Session, layer: Layer, kinds: Sequence[Sparsity], density: float, *, first: bool
) -> list[Contender]:
    """All contenders of a layer; at the first density also what permutations cost, and 2:4."""
    made = contenders.dense(session, layer, session.dtype)

    def ours(kind: Sparsity, permutation: str) -> list[Contender]:
        one = contenders.sparse(session, layer, kind, density, permutation)
        return list(contenders.by_backend(session, one))

    def peers(kind: Sparsity) -> list[Contender]:
        one = contenders.sparse(session, layer, kind, density, "none")
        return list(contenders.peers(session, one, {other.form for other in made}))

    for kind in kinds:
        states = [kind.phases[0]]
        if first:
            # The others say what a permutation costs: none, and, for one structure, a soft one.
            states = [*kind.phases[: 2 if kind is kinds[0] else 1], "none"]
        makes = [partial(ours, kind, state) for state in dict.fromkeys(states)]
        for make in (*makes, partial(peers, kind)):
            made += itertools.chain(*session.tried(f"{kind.label} in {layer.label}", make))
    if first:
        made += session.tried("2:4", partial(contenders.two_of_four, session, layer))
    return made


def _trained(sides: Sequence[Contender]) -> dict[str, Contender]:
    """The layer that training ends with, for each structure."""
    found: dict[str, Contender] = {}
    for one in sides:
        if one.form.startswith("packed") and one.permutation != "soft":
            found.setdefault(one.structure, one)
    return found


def _cell(
    session: Session, layer: Layer, made: Sequence[Contender], tokens: int, what: str
) -> list[Row]:
    """One kind of pass of all contenders over so many tokens."""
    torch.compiler.reset()  # every cell is a variant, and the number of variants is limited
    forward, passes, size = what == "forward", PASSES[what], session.dtype.itemsize
    sides = [one for one in made if one.trained or forward]
    if forward and any(one.kind == "strong" for one in made):
        sides.append(contenders.onednn(made[0], layer, tokens))
    x = torch.randn(tokens, layer.in_features).to(session.device, session.dtype)
    dy = torch.randn(tokens, layer.out_features).to(session.device, session.dtype)
    graphs = session.device.type == "cuda" and tokens <= GRAPH_TOKENS
    entries = layer.in_features * layer.out_features

    def twin(density: float) -> Call:
        weight = round(density * entries) * size
        call = bytes_twin(x.nbytes, dy.nbytes, weight, passes, session.device)
        return captured(call, 1) if graphs else call

    twins = {f"bytes twin {d:g}": twin(d) for d in {one.density_asked for one in sides}}

    def floor(one: Contender, samples: Samples) -> float:
        moved = float(np.median(samples[f"bytes twin {one.density_asked:g}"]))
        return max(moved, 2 * tokens * one.density * entries * len(passes) / session.ceilings.rate)

    about: Row = {"suite": "layers", "case": layer.label, "tokens": tokens, "pass": what}
    with torch.set_grad_enabled(not forward):
        calls = [(one, _pass(one, x, dy, forward)) for one in sides]
        rows = session.compare(about, calls, floor=floor, twins=twins, graphs=graphs)
    for structure, one in _trained(sides).items():
        chosen = _trained_by(session, one, tokens)
        for row in rows:
            if row["structure"] == structure and row["form"].startswith("packed"):
                row["dispatcher"] = chosen
    return rows


def _pass(one: Contender, x: Tensor, dy: Tensor, forward: bool) -> Call:
    """One pass by the next module in turn."""
    turns = itertools.cycle(one.modules)
    if forward:
        return lambda: next(turns)(x)
    leaf = x.detach().requires_grad_()

    def call() -> Sequence[Tensor]:
        module = next(turns)
        return torch.autograd.grad(module(leaf), (leaf, *module.parameters()), dy)

    return call


def _trained_by(session: Session, one: Contender, tokens: int) -> str:
    """What the dispatcher would train a layer with so many tokens by."""
    if session.timer.left < 0:
        return ""
    alone = replace(one, modules=[copy.deepcopy(one.modules[0])])
    sample = next(alone.modules[0].parameters()).new_ones(
        1, contenders.sparse_layer(one).in_features
    )
    example = partial(alone.modules[0], sample)
    choose = partial(contenders.choose, session, alone, example, tokens)
    return "".join(session.tried("the dispatcher", choose))


def _conversions(session: Session, layer: Layer, made: Sequence[Contender]) -> list[Row]:
    """What follows a rewiring: deriving the indices anew; and packing, once, for inference."""
    sides: list[tuple[Contender, Call]] = []
    for one in _trained(made).values():
        sparse = contenders.sparse_layer(one)
        sides.append((replace(one, form="index"), sparse.index))
        sides.append((replace(one, form="export"), partial(packed_layer, sparse)))
    about: Row = {"suite": "layers", "case": layer.label, "tokens": 0, "pass": "conversion"}
    return session.compare(about, sides)
