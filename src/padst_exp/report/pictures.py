"""Masks and permutations of a run, from its checkpoint. Nothing but tables of numbers is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from padst_exp.config import build
from padst_exp.errors import UserError
from padst_exp.files import one_line, reading
from padst_exp.permutations.permutation import is_bijection
from padst_exp.report.runs import Run, number
from padst_exp.restore import open_run

LARGEST = 1 << 14
"""Features of a weight that is still drawn."""


@dataclass(frozen=True)
class Picture:
    """One sparse weight of a run.

    Args:
        layer: its name.
        density: of the mask.
        mask: bool `[O, I]`, as it is stored.
        permutation: bool `[d, d]`, output feature by input feature; None without one.
        side: of the weight that it acts on, "in" or "out".
        moved: share of features that it does not leave in place.
        connections: bool `[O, I]`, what the layer connects, the permutation applied.
    """

    layer: str
    density: float
    mask: Tensor
    permutation: Tensor | None
    side: str
    moved: float
    connections: Tensor


def picture(run: Run) -> Picture:
    """The first sparse weight of a run that is taller than wide (an MLP's first), else the first.

    Raises:
        UserError: there is no checkpoint, it is damaged, or names what is not ours.
    """
    opened = open_run(run.path)
    structure = build(opened.config.structure, "structure")
    state = opened.weights
    where = f"{opened.path}"
    with reading("run", where, "a checkpoint with sparse linear layers"):
        name, shape, density = _layer(run)
        units = state[f"{name}.active"].long()
        geometry = structure.geometry(*shape, density)
        geometry = geometry.with_row_order(state.get(f"{name}.row_order"))
        if units.dim() != 1 or not len(units) or not bool((units >= 0).all()):
            raise ValueError(f"the units of {name} are none")
        if int(units.max()) >= geometry.num_pools * geometry.pool_size:
            raise ValueError(f"the units of {name} are those of another geometry")
        flat = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.bool)
        flat[geometry.entries(units).flatten()] = True
        mask = flat[:-1].view(shape)
        side, index = _permutation(state, name)
        connections, permutation, moved = mask, None, 0.0
        size = shape[1] if side == "in" else shape[0]
        # Those of convolutions act on channels.
        if index is not None and len(index) == size:
            if not is_bijection(index):
                raise ValueError(f"the permutation of {name} is none of its features")
            connections = mask[:, index.argsort()] if side == "in" else mask[index]
            permutation = torch.zeros(size, size, dtype=torch.bool)
            permutation[torch.arange(size), index] = True
            moved = float((index != torch.arange(size)).double().mean())
    return Picture(
        layer=one_line(name.removesuffix(".weights.0")),
        density=float(mask.double().mean()),
        mask=mask,
        permutation=permutation,
        side=side,
        moved=moved,
        connections=connections,
    )


def _layer(run: Run) -> tuple[str, tuple[int, int], float]:
    """Name, shape and asked density of the weight to draw, as the summary has them."""
    found = []
    for row in run.summary["sparsification"]["layers"]:
        rows, columns = row["shape"]
        if not all(type(size) is int and 0 < size <= LARGEST for size in (rows, columns)):
            raise ValueError(f"its shape is {rows} x {columns}")
        found.append((str(row["name"]), (rows, columns), number(row["density_asked"])))
    if not found:
        raise UserError(f"run: expected one with sparse layers, {run.path.name} has none")
    return next((layer for layer in found if layer[1][0] > layer[1][1]), found[0])


def _permutation(state: dict[str, Tensor], weight: str) -> tuple[str, Tensor | None]:
    """The side of a weight's hard permutation, and its index; None while it is soft."""
    layer, _, part = weight.partition(".weights.")
    names = {"out": f"{layer}.output_permutations.{part}", "in": f"{layer}.input_permutation"}
    for side, name in names.items():
        index = state.get(f"{name}.index")
        if index is not None and bool((index >= 0).all()):
            return side, index.long()
    return "in", None
