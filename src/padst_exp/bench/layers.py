"""Suite `layers`: single sparse layers, their permutations and conversions, beside dense ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from padst_exp.bench import configurations
from padst_exp.bench.configurations import Shape, describe
from padst_exp.bench.keys import BenchSchema
from padst_exp.bench.report import Line, Row, timing_rows
from padst_exp.bench.roofline import BytesTwin
from padst_exp.bench.session import Session
from padst_exp.bench.sides import (
    Side,
    dense_sides,
    masked_sides,
    packed_dense_side,
    permuted_sides,
    semi_structured_sides,
    sparse_sides,
)
from padst_exp.bench.timing import Call, captured
from padst_exp.bench.topology import is_permuted, topology
from padst_exp.dispatch.backends import training_decision
from padst_exp.errors import UserError
from padst_exp.structures import Product, Structure
from padst_kernels.entries import condense

SUITE = "layers"
ROUNDS = {"cpu": 11, "cuda": 7}
TOKENS = {"cpu": [1, 8, 197, 788], "cuda": [1, 197, 50432]}
SHAPES = {"cpu": ["vit_b"], "cuda": ["vit_b", "vit_l", "gpt2", "gpt2_medium", "gpt2_xl"]}
# Up to here a GPU waits for Python, and CUDA graphs help.
GRAPH_TOKENS = 1024
MAX_GRAPHED = 16
GRAPH = ", CUDA graph"
FORWARD, BOTH, APART = "forward", "forward+backward", ("dX", "dW")
TWIN = "bytes twin"
TWINS = {FORWARD: (FORWARD,), BOTH: (FORWARD, *APART), "dX": ("dX",), "dW": ("dW",)}


def run(settings: BenchSchema, session: Session) -> Iterator[list[Row]]:
    """Time every layer at every density and token count; all sides of a cell in turn.

    Raises:
        UserError: an unknown shape or structure.
    """
    kind = session.device.type
    shapes = configurations.shapes(settings.shapes or SHAPES[kind])
    names = settings.structures or configurations.LAYER_STRUCTURES
    structures = [configurations.structure(name) for name in names]
    tokens = settings.tokens or TOKENS[kind]
    densities = [round(1 - sparsity, 6) for sparsity in settings.sparsities]
    cells = [
        (density, shape, num_tokens, what)
        for density, shape in itertools.product(densities, shapes)
        for num_tokens in tokens
        for what in _passes(kind, num_tokens)
    ]
    # The sides of a layer are made once, for all that is done with them.
    groups = itertools.groupby(session.affordable(SUITE, cells), key=lambda cell: cell[:2])
    for (density, shape), group in groups:
        legal = _legal(session, shape, structures, density)
        if not legal:
            # Dense sides alone are nothing to compare.
            continue
        sides = _sides(session, shape, legal, density, first=density == densities[0])
        for _, _, num_tokens, what in group:
            name = f"{shape}, {num_tokens} tokens, {what}"
            yield session.tried(name, partial(_cell, session, shape, sides, num_tokens, what))
        for structure in legal:
            name = f"conversions of {describe(structure)}"
            yield session.tried(name, partial(_conversions, session, shape, structure, density))
        session.say(f"{SUITE}: {shape} at density {density:g}")


def _passes(kind: str, num_tokens: int) -> tuple[str, ...]:
    """What is timed. On a GPU enough tokens leave the gradients to be told apart."""
    apart = kind == "cuda" and num_tokens > GRAPH_TOKENS
    return (FORWARD, BOTH, *(APART if apart else ()))


def _legal(
    session: Session, shape: Shape, structures: Sequence[Structure], density: float
) -> list[Structure]:
    """Those that can hold a density in a layer; names the others."""
    legal = []
    for structure in structures:
        try:
            structure.layout(shape.out_features // shape.split, shape.in_features, density)
            legal.append(structure)
        except UserError as error:
            session.say(f"{describe(structure)} in {shape}: skipped, {error}")
    return legal


def _sides(
    session: Session, shape: Shape, structures: Sequence[Structure], density: float, *, first: bool
) -> list[Side]:
    """All sides of a layer; at the first density also what permutations cost, and 2:4."""
    plain = dense_sides(session, shape)
    sides = list(plain)
    for structure in structures:
        make = partial(sparse_sides, session, shape, structure, density, plain=first)
        sides += session.tried(describe(structure), make)
    layer = session, shape, structures[0], density
    sides += session.tried("masked dense", partial(masked_sides, *layer, plain[0]))
    if first:
        if is_permuted(structures[0]):
            sides += session.tried("permutations", partial(permuted_sides, *layer))
        sides += session.tried("torch 2:4", partial(semi_structured_sides, session, shape))
    return sides


def _cell(
    session: Session, shape: Shape, sides: Sequence[Side], num_tokens: int, what: str
) -> list[Row]:
    """One kind of pass of all sides over so many tokens."""
    torch.compiler.reset()  # every cell is a variant, and the number of variants is limited
    device = session.device
    backward = what != FORWARD
    sides = [
        side
        for side in sides
        if (side.trained is not None or not backward) and num_tokens <= side.most_tokens
    ]
    if not backward and any(side.kind == "strong" for side in sides):
        sides.append(packed_dense_side(session, sides[0], num_tokens))
    x = session.random(num_tokens, shape.in_features)
    dy = session.random(num_tokens, shape.out_features)
    graphs = device.type == "cuda" and num_tokens <= GRAPH_TOKENS
    calls: dict[str, Call] = {}
    forms: dict[str, tuple[Side, str]] = {}
    passes: dict[str, int] = {}
    refused: dict[str, str] = {}
    with torch.set_grad_enabled(backward):
        for side in sides:
            reason = side.kernel and session.refusal(side.kernel, side.structure, backward=backward)
            forms[side.name] = side, ""
            if reason:
                refused[side.name] = reason
                continue
            calls[side.name] = _pass(side, x, dy, what)
            if graphs:
                name = f"{side.name}{GRAPH}"
                passes[name] = min(len(side.weights), MAX_GRAPHED)
                calls[name] = captured(calls[side.name], device, passes[name])
                forms[name] = side, GRAPH
        # First, since nothing has a floor without them.
        calls = {**_twins(session, shape, sides, num_tokens, what, graphs), **calls}
        samples, failed = session.alternate(calls, rounds=ROUNDS[device.type], passes=passes)
    lines = {
        name: Line(
            case=str(shape),
            tokens=num_tokens,
            what=what,
            structure=side.structure,
            form=side.form + suffix,
            scope="all",
            permutation=side.permutation,
            density_asked=side.density_asked,
            density=side.density,
            side=side.kind,
            floor=_floor(session, side, num_tokens, what, samples),
            dispatcher=_choice(session, side, num_tokens),
        )
        for name, (side, suffix) in forms.items()
    }
    return timing_rows(session, SUITE, lines, samples, {**failed, **refused})


def _pass(side: Side, x: Tensor, dy: Tensor, what: str) -> Call:
    """One pass over the next weight in turn."""
    product, trained = side.product, side.trained
    if what == FORWARD:
        rotation = itertools.cycle(side.weights)
        return lambda: product(x, next(rotation))
    assert trained is not None
    leaf = x.detach().requires_grad_(what != "dW")
    for weight in side.weights:
        for tensor in trained(weight):
            tensor.requires_grad_(what != "dX")
    if what in APART:
        graphs: list[tuple[Tensor, list[Tensor]]] = []
        turns = itertools.cycle(range(2))

        def apart() -> Sequence[Tensor]:
            if not graphs:
                # So many tokens leave nothing of a weight in the cache; two are enough.
                for weight in side.weights[:2]:
                    wanted = [leaf] if what == "dX" else list(trained(weight))
                    graphs.append((product(leaf, weight), wanted))
            y, wanted = graphs[next(turns)]
            return torch.autograd.grad(y, wanted, dy, retain_graph=True)

        return apart
    rotation = itertools.cycle(side.weights)

    def both() -> Sequence[Tensor]:
        weight = next(rotation)
        return torch.autograd.grad(product(leaf, weight), (leaf, *trained(weight)), dy)

    return both


def _twins(
    session: Session,
    shape: Shape,
    sides: Sequence[Side],
    num_tokens: int,
    what: str,
    graphs: bool,
) -> dict[str, Call]:
    """What reads and writes as many bytes as a dense weight, and as the sparse ones, need."""
    size = session.dtype.itemsize
    weight = size * shape.in_features * shape.out_features
    activations = size * num_tokens * shape.in_features, size * num_tokens * shape.out_features
    twins: dict[str, Call] = {}
    for density in {round(side.density_asked, 6) for side in sides}:
        twin = BytesTwin(
            *activations, round(density * weight), passes=TWINS[what], device=session.device
        )
        twins[f"{TWIN} {density}"] = captured(twin, session.device) if graphs else twin
    return twins


def _floor(
    session: Session, side: Side, num_tokens: int, what: str, samples: Mapping[str, list[float]]
) -> float | None:
    """Seconds of the bytes twin, or of the arithmetic at the rate of the fastest dense product."""
    twin = samples.get(f"{TWIN} {round(side.density_asked, 6)}")
    if twin is None:
        return None
    moved = float(np.median(twin))
    operations = 2 * num_tokens * side.entries * len(TWINS[what])
    return max(moved, operations / session.ceilings.rate)


def _choice(session: Session, side: Side, num_tokens: int) -> str:
    """What the dispatcher takes for training such a product."""
    found = side.topology
    if found is None or session.budget.left < 0:
        return ""
    allowed = session.backends(side.structure)
    possible = Product(found.layouts, "packed").backends(session.device)
    possible = [backend for backend in possible if backend in allowed]
    if not possible:
        return ""
    permuted = found.input_index is not None, found.output_index() is not None
    decide = partial(
        training_decision,
        found.layouts, possible, num_tokens, session.dtype, session.device, False, permuted,
    )  # fmt: skip
    return "".join(session.tried("the dispatcher", lambda: [decide().choice]))


def _conversions(session: Session, shape: Shape, structure: Structure, density: float) -> list[Row]:
    """What follows a rewiring: deriving the indices anew; and condensing, once, for inference."""
    found = topology(session, shape, structure, density)
    layout = found.layouts[0]
    product = Product(found.layouts, "packed")
    calls: dict[str, Call] = {"fold": lambda: found.fold(product)}
    if layout.tile_shape is None:
        entries = found.entries()
        values = session.random(len(entries))
        calls["condense"] = lambda: condense(values, entries, *found.shape)
    samples, failed = session.alternate(calls, rounds=ROUNDS[session.device.type])
    lines = {
        name: Line(
            case=str(shape),
            tokens=0,
            what="conversion",
            structure=describe(structure),
            form=name,
            scope="all",
            permutation=found.permutation,
            density_asked=density,
            density=layout.density,
        )
        for name in calls
    }
    return timing_rows(session, SUITE, lines, samples, failed)
