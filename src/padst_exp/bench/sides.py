"""Ways to multiply by one weight: dense, packed, condensed, permuted, and those of others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from padst_exp.bench import dense, peers
from padst_exp.bench.configurations import Shape, describe
from padst_exp.bench.environment import rotation
from padst_exp.bench.session import SCATTERED, Session
from padst_exp.layers import SparseLinear, permutations
from padst_exp.permutations import DoublyStochastic
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Layout, Product, Structure, scatter_entries
from padst_kernels.fan_in import FanIn, condense, fan_in_linear

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
        layouts: of the sparse weight, for the dispatcher; none where it has no say.
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
    layouts: Sequence[Layout] = ()

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
    session: Session, shape: Shape, structure: Structure, density: float
) -> list[Side]:
    """The product that training uses, condensed where entries are single, and peers' formats.

    Raises:
        UserError: the structure cannot hold that density in this shape.
    """
    layout = structure.layout(shape.out_features // shape.split, shape.in_features, density)
    layouts = [layout] * shape.split
    units = [layout.random_units(torch.default_generator).to(session.device) for _ in layouts]
    sides = _packed(session, layouts, units)
    matrix = torch.cat(
        [
            scatter_entries(_values(session, layout), layout.entries(active), layout.shape)
            for active in units
        ]
    )
    if layout.tile_shape is None:
        sides.append(_condensed(session, layouts, matrix))
    found, missing = peers.peers(structure, session.device, session.dtype)
    for name, reason in missing.items():
        session.say(f"{name}: skipped, {reason}")
    sides += [_peer(session, peer, matrix, layout) for peer in found]
    return [
        replace(side, structure=describe(structure), density_asked=density, density=layout.density)
        for side in sides
    ]


def _packed(session: Session, layouts: Sequence[Layout], units: Sequence[Tensor]) -> list[Side]:
    sides = []
    entries = sum(layout.num_entries for layout in layouts)
    shared = {id(layout): layout for layout in layouts}
    possible = Product(layouts, "packed").backends(session.device)
    for backend in possible:
        if backend == "dense" and "torch" in possible:
            continue
        product = Product(layouts, "packed", backend)
        product.fold(units, None, [None] * len(layouts))
        size = entries * session.dtype.itemsize + sum(b.nbytes for b in product.buffers())
        sides.append(
            Side(
                structure="",
                # "dense" multiplies by a dense weight that lives during a pass only.
                form=SCATTERED if backend == "dense" else f"packed, {backend}",
                product=lambda x, weight: weight[0](x, weight[1]),
                weights=[
                    (
                        copy.deepcopy(product, {**shared}),
                        [_values(session, layout) for layout in layouts],
                    )
                    for _ in range(rotation(size, session.device))
                ],
                trained=lambda weight: weight[1],
                entries=entries,
                size=size,
                layouts=layouts,
            )
        )
    return sides


def _condensed(session: Session, layouts: Sequence[Layout], matrix: Tensor) -> Side:
    flat = matrix.flatten()
    places = flat.nonzero().squeeze(1)
    first = condense(flat[places], places, *matrix.shape)
    size = sum(part.nbytes for part in first if isinstance(part, Tensor))

    def another() -> FanIn:
        return first._replace(
            values=first.values.clone(),
            columns=first.columns.clone(),
            row_pointer=first.row_pointer.clone(),
            rows=first.rows.clone(),
        )

    return Side(
        structure="",
        form="condensed",
        product=fan_in_linear,
        weights=[another() for _ in range(rotation(size, session.device))],
        trained=None,
        entries=len(places),
        size=size,
        layouts=layouts,
    )


def _peer(session: Session, peer: peers.Peer, matrix: Tensor, layout: Layout) -> Side:
    entries = round(layout.density * matrix.numel())
    size = entries * session.dtype.itemsize
    first = peer.make(matrix)
    return Side(
        structure="",
        form=peer.form,
        product=peer.product,
        weights=[first.clone() for _ in range(rotation(size, session.device))],
        trained=(lambda weight: [weight]) if peer.backward else None,
        entries=entries,
        size=size,
    )


def masked_side(
    session: Session, shape: Shape, structure: Structure, density: float, plain: Side
) -> Side:
    """A dense weight times a mask, as most code trains sparse layers."""
    layout = structure.layout(shape.out_features, shape.in_features, density)
    kept = torch.ones(layout.num_active, layout.unit_size, dtype=torch.bool)
    units = layout.random_units(torch.default_generator)
    mask = scatter_entries(kept, layout.entries(units), layout.shape).to(session.device)
    weights = [(weight, mask.clone()) for weight in plain.weights]
    return Side(
        structure=describe(structure),
        form="masked dense",
        product=lambda x, w: peers.masked(x, *w),
        weights=weights,
        trained=lambda w: [w[0]],
        entries=plain.entries,
        size=plain.size + mask.nbytes,
        density_asked=density,
        density=layout.density,
    )


def semi_structured_side(session: Session, shape: Shape) -> Side | None:
    """PyTorch's 2:4, at its one density; None, and a message, where there is none."""
    peer = peers.semi_structured(session.device, session.dtype)
    if isinstance(peer, str):
        session.say(f"torch 2:4: skipped, {peer}")
        return None
    entries = shape.in_features * shape.out_features // 2
    # Two bits tell where each value stood.
    size = entries * session.dtype.itemsize + entries // 4
    weights = [peer.make(_random(session, shape)) for _ in range(rotation(size, session.device))]
    return Side(
        structure=peer.structure, form=peer.form, product=peer.product, weights=weights,
        trained=None, entries=entries, size=size, density_asked=0.5, density=0.5,
    )  # fmt: skip


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
    size = shape.out_features, shape.in_features
    return torch.randn(size, device=session.device, dtype=session.dtype)


def _values(session: Session, layout: Layout) -> Tensor:
    size = layout.num_active, layout.unit_size
    return torch.randn(size, device=session.device, dtype=session.dtype)
