"""Butterflies, shuffled blocks, and what structures say of their units."""

import torch

from padst_exp.pools import TRAITS
from padst_exp.structures import Butterfly, ShuffledBlock, random_units
from structure_cases import STRUCTURES, shapes


def pattern(cells: int, num_strides: int) -> torch.Tensor:
    """The sum of butterfly factors: the identity, and one shuffle for each stride."""
    mask = torch.eye(cells, dtype=torch.bool)
    for bit in range(num_strides - 1):
        for cell in range(cells):
            mask[cell, cell ^ (1 << bit)] = True
    return mask


def test_a_butterfly_is_the_papers_pattern_stretched_over_the_blocks() -> None:
    for shape, cells in [((128, 128), 16), ((64, 128), 8), ((128, 32), 4), ((96, 96), 8)]:
        for num_strides in range(1, cells.bit_length() + 1):
            density = num_strides / cells
            structure = Butterfly(size=8)
            geometry = structure.geometry(*shape, density)
            counts = structure.initial_counts(geometry, density)
            if shape != (96, 96):  # 12 blocks over 8 cells are not one for each
                assert torch.equal(counts, geometry.candidates)
            active = random_units(geometry, counts, torch.Generator())
            mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
            mask[geometry.entries(geometry.unit_ids()).flatten()] = True
            rows = torch.arange(shape[0]) // 8 * cells // (shape[0] // 8)
            columns = torch.arange(shape[1]) // 8 * cells // (shape[1] // 8)
            wanted = pattern(cells, num_strides)[rows][:, columns]
            if shape != (96, 96):
                assert torch.equal(mask.view(shape), wanted)
            else:
                assert bool((wanted | ~mask.view(shape)).all())
            assert abs(len(active) * 64 - density * shape[0] * shape[1]) <= 32


def test_other_densities_take_part_of_the_last_stride() -> None:
    structure = Butterfly(size=8)
    geometry = structure.geometry(128, 128, 0.1)
    counts = structure.initial_counts(geometry, 0.1)
    # 256 blocks: 16 on the diagonal, and 10 of the 16 of stride 1.
    assert geometry.candidates.tolist() == [16, 16] and counts.tolist() == [16, 10]
    assert geometry.strides.tolist() == [0, 1]


def test_shuffled_blocks_start_as_whole_blocks() -> None:
    for shape in [(64, 48), (67, 41), (5, 30)]:
        structure = ShuffledBlock(size=8)
        geometry = structure.geometry(*shape, 0.3)
        counts = structure.initial_counts(geometry, 0.3)
        active = random_units(geometry, counts, torch.Generator().manual_seed(0))
        groups = torch.bincount(active // shape[1], minlength=-(-shape[0] // 8))
        assert bool((groups % 8 == 0).all()) and int(groups.sum()) == int(counts.sum())
        lists = [(active[active // shape[1] == g] % shape[1]).tolist() for g in range(len(groups))]
        if shape[0] > 8:
            assert len(groups.unique()) > 1 and lists[0] != lists[1]
        assert all(own != list(range(len(own))) for own in lists if own)


def test_traits_are_true_of_the_units() -> None:
    for name, structure in STRUCTURES.items():
        for shape in shapes(name):
            geometry = structure.geometry(*shape, 0.25)
            assert geometry.traits <= TRAITS.keys()
            units, (num_rows, num_columns) = geometry.unit_ids(), shape
            places = geometry.coordinates()[units]
            alone = len(places.unique(dim=0)) == len(units)
            varied = all(len(axis.unique()) > 1 for axis in places.unbind(1))
            assert ("grid" in geometry.traits) == (alone and varied), (name, shape)
            rows, columns = geometry.cells(units)
            free = True
            for pool in range(geometry.num_pools):
                own = units // geometry.pool_size == pool
                cells = rows[own] * num_columns + columns[own]
                inside = (rows[own] < num_rows) & (columns[own] < num_columns)
                own_rows = rows[own][inside].unique()
                same_rows = bool((rows[own] == rows[own][:1]).all())
                free &= same_rows and len(cells[inside].unique()) == len(own_rows) * num_columns
            assert free or "neurons" not in geometry.traits, (name, shape)
            assert ("neurons" in geometry.traits) == name.startswith("fan-in"), (name, shape)
            if "shuffled_blocks" in geometry.traits:
                assert torch.equal(columns[:, 0], units % num_columns)
