"""Ways to multiply by one weight: dense, packed, condensed, permuted, and those of others."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from padst_exp.bench import dense, peers
from padst_exp.bench.configurations import Shape, describe
from padst_exp.bench.environment import rotation
from padst_exp.bench.forms import CONDENSED, condensed, packed
from padst_exp.bench.session import Session
from padst_exp.bench.topology import Topology, is_permuted, topology
from padst_exp.layers import SparseLinear, permutations
from padst_exp.permutations import DoublyStochastic
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Backend, Layout, Product, Structure, scatter_entries
from padst_kernels.entries import Condensed, condense, condensed_matmul

Weight = Any


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to multiply, with enough weights to rotate through.

    Args:
        structure: of the weight, with its parameters.
        form: how it is stored and computed.
        product: x `[T, I]` and one of `weights` to y `[T, O]`.
        weights: of whatever type.
        trained: tensors of a weight whose gradients a backward pass computes; None: forward only.
        entries: of one weight, that take part in the arithmetic.
        size: bytes of one weight, indices included.
        kind: see `report.Line`.
        topology: of the sparse weight, for the dispatcher; None where it has no say.
        kernel: of ours that it runs, as checks name it; "" for none.
        most_tokens: that the form is for.
    """

    structure: str
    form: str
    product: Callable[[Tensor, Weight], Tensor]
    weights: Sequence[Weight]
    trained: Callable[[Weight], Sequence[Tensor]] | None
    entries: int
    size: int
    kind: Literal["dense", "strong", "sparse"] = "sparse"
    permutation: str = "none"
    density_asked: float = 1.0
    density: float = 1.0
    topology: Topology | None = None
    kernel: str = ""
    most_tokens: float = inf

    @property
    def name(self) -> str:
        """Unlike that of any other side of a table."""
        parts = [self.structure, self.form]
        parts += [] if self.permutation == "none" else [f"{self.permutation} permutation"]
        return ", ".join(parts)


def dense_sides(session: Session, shape: Shape) -> list[Side]:
    """Eager, compiled, and where there is oneDNN, by that."""
    entries = shape.in_features * shape.out_features
    size = entries * session.dtype.itemsize
    weights = [_random(session, shape) for _ in range(rotation(size, session.device))]

    def side(form: str, product: Any, kind: Literal["dense", "strong"], trained: Any) -> Side:
        return Side(
            structure="dense", form=form, product=product, weights=weights, trained=trained,
            entries=entries, size=size, kind=kind,
        )  # fmt: skip

    def itself(weight: Tensor) -> list[Tensor]:
        return [weight]

    compiled = torch.compile(lambda x, weight: linear(x, weight), dynamic=False)
    sides = [side("eager", linear, "dense", itself), side("compiled", compiled, "dense", itself)]
    if dense.has_onednn(session.device, session.dtype):
        sides.append(side("oneDNN", dense.onednn_linear, "strong", itself))
    return sides


def packed_dense_side(session: Session, plain: Side, num_tokens: int) -> Side:
    """Dense weights in oneDNN's own order, for inference with `num_tokens`."""
    return Side(
        structure="dense",
        form="oneDNN, packed",
        product=dense.onednn_linear,
        weights=[dense.packed_weight(weight, num_tokens) for weight in plain.weights],
        trained=None,
        entries=plain.entries,
        size=plain.size,
        kind="strong",
    )


def sparse_sides(
    session: Session, shape: Shape, structure: Structure, density: float, *, plain: bool
) -> list[Side]:
    """The product that training uses, condensed where entries are single, and peers' formats.

    Args:
        session: where.
        shape: of the layer.
        structure: of its weight; permutations are those that training has, folded.
        density: asked for.
        plain: whether products of tiles run without a permutation, too: what it costs.

    Raises:
        UserError: the structure cannot hold that density in this shape.
    """
    found = topology(session, shape, structure, density)
    tiled = found.layouts[0].tile_shape is not None
    topologies = [found, found.plain()] if plain and tiled and is_permuted(structure) else [found]
    possible = Product(found.layouts, "packed").backends(session.device)
    sides: list[Side] = []
    for one, backend in itertools.product(topologies, possible):
        if backend != "dense" or "torch" not in possible:
            sides += session.tried(packed(backend), partial(_packed, session, one, backend))
    if not tiled:
        sides += session.tried("condensed", partial(_condensed, session, found))
    formats, missing = peers.peers(structure, session.device, session.dtype)
    for name, why in missing.items():
        session.say(f"{name}: skipped, {why}")
    for peer in formats:
        sides += session.tried(peer.form, partial(_peer, session, peer, found))
    return [replace(side, density_asked=density) for side in sides]


def _packed(session: Session, found: Topology, backend: Backend) -> list[Side]:
    layouts = found.layouts
    shared = {id(layout): layout for layout in layouts}
    product = Product(layouts, "packed", backend)
    found.fold(product)
    indices = sum(buffer.nbytes for buffer in product.buffers())
    size = sum(layout.num_entries for layout in layouts) * session.dtype.itemsize + indices
    weights = [
        (copy.deepcopy(product, {**shared}), [_values(session, layout) for layout in layouts])
        for _ in range(rotation(size, session.device))
    ]
    return [
        _side(
            found,
            form=packed(backend),
            product=lambda x, weight: weight[0](x, weight[1]),
            weights=weights,
            trained=lambda weight: weight[1],
            size=size,
            ours=True,
        )
    ]


def _side(
    found: Topology,
    *,
    form: str,
    product: Callable[[Tensor, Weight], Tensor],
    weights: Sequence[Weight],
    trained: Callable[[Weight], Sequence[Tensor]] | None,
    size: int,
    ours: bool = False,
    most_tokens: float = inf,
) -> Side:
    """A side over sparse weights; its density is still to be asked for."""
    entries = sum(layout.num_entries for layout in found.layouts)
    rows, columns = found.shape
    return Side(
        structure=describe(found.structure), form=form, product=product, weights=weights,
        trained=trained, entries=entries, size=size, permutation=found.permutation,
        density=entries / (rows * columns),
        topology=found if ours else None, kernel=form if ours else "", most_tokens=most_tokens,
    )  # fmt: skip


def _condensed(session: Session, found: Topology) -> list[Side]:
    places = found.entries()
    first = condense(session.random(len(places)), places, *found.shape)
    size = sum(part.nbytes for part in first if isinstance(part, Tensor))

    def another() -> Condensed:
        return first._replace(
            values=first.values.clone(),
            columns=first.columns.clone(),
            row_pointer=first.row_pointer.clone(),
            rows=first.rows.clone(),
        )

    weights = [another() for _ in range(rotation(size, session.device))]
    return [
        _side(
            found,
            form=CONDENSED[backend],
            product=partial(
                condensed_matmul, backend="native" if session.device.type == "cpu" else backend
            ),
            weights=weights,
            trained=None,
            size=size,
            ours=True,
            most_tokens=most,
        )
        for backend, most in condensed(session.device).items()
    ]


def _peer(session: Session, peer: peers.Peer, found: Topology) -> list[Side]:
    """A peer knows no permutations: x is gathered before it, or y after it."""
    places = found.plain().entries()
    first = peer.make(scatter_entries(session.random(len(places)), places, found.shape))
    size = sum(layout.num_entries for layout in found.layouts) * session.dtype.itemsize
    inputs, outputs = found.input_index, found.output_index()

    def product(x: Tensor, weight: Tensor) -> Tensor:
        y = peer.product(x if inputs is None else x[:, inputs], weight)
        return y if outputs is None else y[:, outputs]

    return [
        _side(
            found,
            form=peer.form,
            product=product,
            weights=[first.clone() for _ in range(rotation(size, session.device))],
            trained=(lambda weight: [weight]) if peer.backward else None,
            size=size,
        )
    ]


def masked_sides(
    session: Session, shape: Shape, structure: Structure, density: float, plain: Side
) -> list[Side]:
    """A dense weight times a mask, as most code trains sparse layers."""
    found = topology(session, shape, structure, density)
    places = found.entries()
    mask = scatter_entries(torch.ones_like(places, dtype=torch.bool), places, found.shape)
    side = _side(
        found,
        form="masked dense",
        product=lambda x, w: peers.masked(x, *w),
        weights=[(weight, mask.clone()) for weight in plain.weights],
        trained=lambda w: [w[0]],
        size=plain.size + mask.nbytes,
    )
    # It multiplies zeros, too.
    return [replace(side, entries=plain.entries, density_asked=density)]


def semi_structured_sides(session: Session, shape: Shape) -> list[Side]:
    """PyTorch's 2:4, at its one density; none, and a message, where there is none."""
    peer = peers.semi_structured(session.device, session.dtype)
    if isinstance(peer, str):
        session.say(f"torch 2:4: skipped, {peer}")
        return []
    entries = shape.in_features * shape.out_features // 2
    # Two bits tell where each value stood.
    size = entries * session.dtype.itemsize + entries // 4
    weights = [peer.make(_random(session, shape)) for _ in range(rotation(size, session.device))]
    side = Side(
        structure=peer.structure, form=peer.form, product=peer.product, weights=weights,
        trained=None, entries=entries, size=size, density_asked=0.5, density=0.5,
    )  # fmt: skip
    return [side]


def permuted_sides(
    session: Session, shape: Shape, structure: Structure, density: float
) -> list[Side]:
    """A whole sparse layer with its soft permutation, and with the same one hardened and folded."""

    def layer(hard: bool) -> SparseLinear:
        model = nn.Sequential(nn.Linear(shape.in_features, shape.out_features, bias=False))
        sparsify(
            model, [Rule("0", shape.split)], structure=structure, density=density,
            learner=DoublyStochastic(side="auto"),
        )  # fmt: skip
        sparse = model.get_submodule("0")
        assert isinstance(sparse, SparseLinear)
        sparse.to(session.device, session.dtype)
        if hard:
            for permutation in permutations(sparse).values():
                permutation.harden()
            sparse.fold()
        return sparse

    sides = []
    for name, hard in (("soft", False), ("hard", True)):
        first = layer(hard)
        size = sum(p.nbytes for p in first.parameters()) + sum(
            buffer.nbytes for product in first.parts() for buffer in product.buffers()
        )
        # A soft matrix is several times as large as the weight; a few of them are beyond the cache.
        count = rotation(size, session.device)
        layouts = [layout for product in first.parts() for layout in product.layouts]
        shared = {id(layout): layout for layout in layouts}
        layers = [first, *(copy.deepcopy(first, {**shared}) for _ in range(count - 1))]
        entries = sum(layout.num_entries for layout in layouts)
        sides.append(
            Side(
                structure=describe(structure),
                form="layer",
                kernel=packed(first.parts()[0].backend),
                product=lambda x, module: module(x),
                weights=layers,
                trained=lambda module: list(module.parameters()),
                entries=entries,
                size=size,
                permutation=name,
                density_asked=density,
                density=entries / (shape.in_features * shape.out_features),
            )
        )
    return sides


def _random(session: Session, shape: Shape) -> Tensor:
    return session.random(shape.out_features, shape.in_features)


def _values(session: Session, layout: Layout) -> Tensor:
    return session.random(layout.num_active, layout.unit_size)
