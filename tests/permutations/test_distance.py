"""Distances to the identity, against a search through all permutations of a few features."""

import itertools

import pytest
import torch
from torch import Tensor

from padst_exp.permutations import distance_to_identity
from padst_exp.pools import Symmetry
from padst_exp.structures import (
    NM,
    Block,
    Butterfly,
    Diagonal,
    FanIn,
    Geometry,
    ShuffledBlock,
    Structure,
    Unstructured,
)

# Edges, units wider than the weight, one feature, several units that fill it.
STRUCTURES: dict[str, Structure] = {
    "unstructured": Unstructured(),
    "block": Block(size=2, balanced=False),
    "block-balanced": Block(size=2, balanced=True),
    "block-4": Block(size=4, balanced=False),
    "butterfly": Butterfly(size=1),
    "butterfly-2": Butterfly(size=2),
    "nm": NM(n=1, m=None, group=1),
    "nm-2": NM(n=1, m=None, group=2),
    "fan-in-2": FanIn(group=2),
    "shuffled-block": ShuffledBlock(size=2),
    "diag": Diagonal(bundle=1, stride=1, width=1),
    "band-2": Diagonal(bundle="band", stride=1, width=2),
    "band-3": Diagonal(bundle="band", stride=1, width=3),
    "band-6": Diagonal(bundle="band", stride=1, width=6),
    "stride-1": Diagonal(bundle="stride", stride=1, width=1),
    "stride-2": Diagonal(bundle="stride", stride=2, width=1),
    "stride-3": Diagonal(bundle="stride", stride=3, width=1),
}
SHAPES = [(6, 6), (6, 4), (4, 6), (6, 3), (3, 6), (5, 6), (6, 5), (6, 2), (2, 6), (1, 6), (6, 1)]


def symmetries(geometry: Geometry, counts: Tensor, side: str, taps: int = 1) -> list[list[int]]:
    """All permutations of features that take units to units, and pools to pools like them."""
    rows, columns = geometry.shape
    units = geometry.unit_ids().tolist()
    entries = [
        [(e // columns, e % columns) for e in row if e < rows * columns]
        for row in geometry.entries(torch.tensor(units)).tolist()
    ]
    pools_of = [unit // geometry.pool_size for unit in units]
    pool_of = dict(zip(map(frozenset, entries), pools_of, strict=True))
    like = torch.stack([geometry.candidates, geometry.unit_sizes, counts], 1).tolist()
    size = (columns if side == "in" else rows) // taps
    found = []
    for index in itertools.permutations(range(size)):
        pools: dict[int, int] = {}
        for cells, pool in pool_of.items():
            moved = frozenset(
                (r, c // size * size + index[c % size]) if side == "in" else (index[r], c)
                for r, c in cells
            )
            to = pool_of.get(moved, -1)
            if to < 0 or like[to] != like[pool] or pools.setdefault(pool, to) != to:
                break
        else:
            found.append(list(index))
    return found


def cases() -> list[tuple[str, Geometry, Tensor]]:
    found = []
    for (name, structure), shape in itertools.product(STRUCTURES.items(), SHAPES):
        for density in (0.5, 1 / 3, 2 / 3, 1.0):
            try:
                geometry = structure.geometry(*shape, density)
            except ValueError:
                continue
            counts = (geometry.candidates + 1) // 2
            if name.startswith("butterfly"):
                # It fills its pools in turn, so that they are not alike.
                counts = torch.arange(geometry.num_pools)
            found.append((f"{name} {shape}", geometry, counts))
            break
    return found


def test_the_distance_is_that_to_the_nearest_symmetry() -> None:
    torch.manual_seed(0)
    tried = cases()
    assert len({name.partition(" ")[0] for name, _, _ in tried}) == len(STRUCTURES)
    for name, geometry, counts in tried:
        for side in ("in", "out"):
            group = torch.tensor(symmetries(geometry, counts, side))
            symmetry = geometry.symmetry(side)
            picks = torch.randint(len(group), (4,))
            drawn = [torch.randperm(group.shape[1]) for _ in range(12)]
            for index in [*group[picks], *drawn]:
                nearest = int((group == index).sum(1).max())
                distance = distance_to_identity(index, symmetry)
                assert distance == pytest.approx(1 - nearest / len(index)), f"{name} {side}"


def test_channels_are_alike_where_they_are_so_at_every_tap() -> None:
    torch.manual_seed(0)
    exact = 0
    for name, structure in STRUCTURES.items():
        for rows, channels, taps in ((6, 4, 3), (4, 6, 2), (6, 5, 2), (4, 4, 2), (16, 4, 2)):
            try:
                geometry = structure.geometry(rows, taps * channels, 0.5)
            except ValueError:
                continue
            counts = structure.initial_counts(geometry, 0.5)
            group = torch.tensor(symmetries(geometry, counts, "in", taps))
            symmetry = geometry.symmetry("in").of_channels(taps)
            for index in [torch.arange(channels), *(torch.randperm(channels) for _ in range(12))]:
                nearest = 1 - int((group == index).sum(1).max()) / channels
                distance = distance_to_identity(index, symmetry)
                # Nothing that can be seen is called alike.
                assert distance > nearest - 1e-9, name
                exact += distance == pytest.approx(nearest)
    assert exact > 300


def test_what_weights_of_one_layer_share_is_seen_by_none_of_them() -> None:
    torch.manual_seed(0)
    exact = 0
    pairs: list[tuple[Structure, float, float]] = [
        (NM(n=1, m=None, group=1), 1 / 3, 1 / 2),
        (NM(n=1, m=None, group=2), 1 / 6, 1 / 3),
        (NM(n=2, m=None, group=1), 1 / 3, 2 / 3),
        (Butterfly(size=1), 1 / 2, 1 / 3),
        (Block(size=2, balanced=True), 1 / 2, 1 / 3),
        (Diagonal(bundle=1, stride=1, width=1), 1 / 2, 1 / 3),
    ]
    for structure, *densities in pairs:
        geometries = [structure.geometry(4, 6, density) for density in densities]
        groups = [
            set(map(tuple, symmetries(g, structure.initial_counts(g, density), "in")))
            for g, density in zip(geometries, densities, strict=True)
        ]
        group = torch.tensor(sorted(groups[0] & groups[1]))
        symmetry = Symmetry.of_all([geometry.symmetry("in") for geometry in geometries])
        for index in [*group[torch.randint(len(group), (4,))], *map(torch.randperm, [6] * 12)]:
            nearest = 1 - int((group == index).sum(1).max()) / 6
            distance = distance_to_identity(index, symmetry)
            assert distance > nearest - 1e-9, structure
            exact += distance == pytest.approx(nearest)
    assert exact > 85
    # Pairs of features for one, triples for the other: to swap two pairs is seen by the second.
    two, three = (Symmetry(labels=torch.arange(6) // width) for width in (2, 3))
    swapped = torch.tensor([2, 3, 0, 1, 4, 5])
    assert distance_to_identity(swapped, two) == 0
    assert distance_to_identity(swapped, Symmetry.of_all([two, three])) > 0
    assert Symmetry.of_all([two, two]) is two


def test_rows_that_moved_take_their_classes_along() -> None:
    geometry = ShuffledBlock(size=2).geometry(6, 4, 0.5)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    labels = geometry.with_row_order(order).symmetry("out").labels
    assert labels[3] == labels[0] and labels[5] == labels[1] and labels[2] == labels[4]
    assert labels.unique().tolist() == [0, 1, 2]


def test_features_that_change_class_are_counted() -> None:
    blocks = Symmetry(labels=torch.arange(12) // 4)
    index = torch.arange(12)
    index[[0, 4]] = index[[4, 0]]
    assert distance_to_identity(index, blocks) == pytest.approx(2 / 12)
    # Spread over all blocks: as far as possible.
    spread = torch.arange(9).view(3, 3).T.flatten()
    thirds = Symmetry(labels=torch.arange(9) // 3)
    assert distance_to_identity(spread, thirds) == pytest.approx(2 / 3)
    # Classes of unequal width cannot be swapped.
    uneven = Symmetry(labels=torch.tensor([0, 0, 0, 1, 1]))
    swapped = torch.tensor([3, 4, 2, 0, 1])
    assert distance_to_identity(swapped, uneven) == pytest.approx(4 / 5)
    # A reversal is far from every shift.
    shifts = Symmetry(labels=torch.arange(9), step=1)
    assert distance_to_identity(torch.arange(9).roll(5), shifts) == 0
    assert distance_to_identity(torch.arange(9).flip(0), shifts) == pytest.approx(8 / 9)
