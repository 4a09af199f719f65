from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padst_exp.errors import UserError
from padst_exp.structures import (
    NM,
    Block,
    Diagonal,
    Geometry,
    best_units,
    gather_entries,
    random_units,
    scatter_entries,
)
from padst_exp.structures.structure import share_budget
from structure_cases import STRUCTURES, shapes

DENSITY = 0.25


def cases() -> Iterator[tuple[str, Geometry, torch.Tensor]]:
    """Every structure in every shape: its name, its geometry and its first counts."""
    for name, structure in STRUCTURES.items():
        for shape in shapes(name):
            geometry = structure.geometry(*shape, DENSITY)
            yield f"{name} {shape}", geometry, structure.initial_counts(geometry, DENSITY)


def drawn(geometry: Geometry, counts: torch.Tensor) -> torch.Tensor:
    return random_units(geometry, counts, torch.Generator().manual_seed(0))


def test_units_cover_every_entry_once_and_know_their_sizes() -> None:
    for name, geometry, _ in cases():
        units = geometry.unit_ids()
        entries = geometry.entries(units)
        inside = entries < geometry.shape[0] * geometry.shape[1]
        covered = entries[inside].sort().values
        if name.startswith("butterfly"):
            # A fixed pattern: most entries are in no unit.
            assert bool((covered.diff() > 0).all()), name
        else:
            assert torch.equal(covered, torch.arange(geometry.shape[0] * geometry.shape[1])), name
        sizes = geometry.unit_sizes[units // geometry.pool_size]
        assert torch.equal(inside.sum(1), sizes), name


def test_the_budget_is_met_within_one_unit() -> None:
    for name, geometry, counts in cases():
        budget = DENSITY * geometry.shape[0] * geometry.shape[1]
        # All rows of these have as many inputs, N:M rows n in each chunk: that is what is chosen.
        rows = geometry.shape[0]
        steps = {"nm": 2 * rows, "fan": rows, "shuffled": 8 * 8}
        step = steps.get(name.split("-")[0], geometry.unit_size)
        assert abs(int((counts * geometry.unit_sizes).sum()) - budget) < step, name
        assert bool((counts >= 0).all() and (counts <= geometry.candidates).all()), name


def test_other_densities_than_the_one_that_cut_the_weight_are_met_too() -> None:
    for name, structure in STRUCTURES.items():
        for shape in shapes(name):
            geometry = structure.geometry(*shape, DENSITY)
            for density in (DENSITY, 0.5, 0.8, 1.0):
                counts = structure.initial_counts(geometry, density)
                kept = int((counts * geometry.unit_sizes).sum())
                # A unit, or one in each pool where all pools have as many.
                alike = name.startswith(("nm", "fan"))
                step = int(geometry.unit_sizes.sum()) if alike else geometry.unit_size
                # Whole blocks; a butterfly has no more than its pattern.
                step = 8 * 8 if name == "shuffled-block" else step
                if name == "butterfly" and density > DENSITY:
                    continue
                assert abs(kept - density * shape[0] * shape[1]) < step, (name, shape, density)
                assert bool((counts <= geometry.candidates).all()), name


def test_a_drawn_topology_has_the_count_of_every_pool() -> None:
    for name, geometry, counts in cases():
        active = drawn(geometry, counts)
        pools = active // geometry.pool_size
        assert torch.equal(torch.bincount(pools, minlength=geometry.num_pools), counts), name
        assert bool((active.diff() > 0).all()), name
        assert bool((active % geometry.pool_size < geometry.candidates[pools]).all()), name


def test_units_are_scored_by_the_root_mean_square_of_their_entries() -> None:
    for name, geometry, counts in cases():
        dense = torch.randn(geometry.shape, dtype=torch.float64)
        table, units = geometry.unit_rms(dense).flatten(), geometry.unit_ids()
        for unit in units[:: max(1, len(units) // 7)]:
            entries = geometry.entries(unit[None])[0]
            values = dense.flatten()[entries[entries < dense.numel()]]
            assert table[unit] == pytest.approx(float(values.square().mean().sqrt())), name
        active = drawn(geometry, counts)
        frames = gather_entries(dense, geometry.entries(active))
        torch.testing.assert_close(geometry.frame_rms(frames, active), table[active])


def test_scores_of_tiny_and_of_huge_entries_are_told_apart() -> None:
    for name, structure in STRUCTURES.items():
        geometry = structure.geometry(*shapes(name)[-1], 0.25)
        for dtype, exponents in ((torch.float32, (-80, 70)), (torch.float64, (-600, 550))):
            dense = torch.randn(geometry.shape, dtype=dtype)
            for exponent in exponents:  # a power of two rounds nothing
                scaled = geometry.unit_rms(dense * 2.0**exponent)
                assert torch.equal(scaled, geometry.unit_rms(dense) * 2.0**exponent), name
        nothing = geometry.unit_rms(torch.zeros(geometry.shape))
        assert not nothing.any() and len(geometry.unit_rms(torch.ones(geometry.shape)).unique()) < 3


def test_coordinates_are_those_of_each_units_first_cell() -> None:
    for name, geometry, _ in cases():
        table, units = geometry.coordinates(), geometry.unit_ids()
        rows, columns = geometry.cells(units)
        assert torch.equal(table[units], torch.stack([rows[:, 0], columns[:, 0]], 1)), name
        nobody = torch.ones(len(table), dtype=torch.bool)
        nobody[units] = False
        assert bool((table[nobody] == -1).all()), name


def test_tiles_hold_the_cells_of_frames() -> None:
    for name, geometry, counts in cases():
        tiling, units = geometry.tiling(), drawn(geometry, counts)
        if tiling is None:
            assert geometry.frame[2] < 8 or name.startswith("diag"), "only low tiles go without"
            continue
        columns, owner = tiling.locate(units)
        rows, frame_columns = geometry.cells(units)
        count, width, height = geometry.frame
        assert (tiling.width, tiling.height) == (width, height)
        first = frame_columns.view(-1, count, width, height)[..., 0]
        assert torch.equal(columns.flatten(), first.flatten()), name
        positions = geometry.row_positions()
        positions = torch.arange(geometry.shape[0]) if positions is None else positions
        inside = rows < geometry.shape[0]
        expected = owner.view(-1, count, 1, 1).expand(-1, count, width, height).flatten(1)
        assert torch.equal(positions[rows[inside]] // height, expected[inside]), name
        if tiling.ascending:
            assert bool((owner.diff() >= 0).all()), name


def test_a_row_order_moves_rows_and_nothing_else() -> None:
    for name, geometry, counts in cases():
        order = torch.randperm(geometry.shape[0])
        moved, units = geometry.with_row_order(order), drawn(geometry, counts)
        dense = torch.randn(geometry.shape)
        shuffled = torch.empty_like(dense).index_copy_(0, order, dense)
        before, after = geometry.entries(units), moved.entries(units)
        assert torch.equal(gather_entries(shuffled, after), gather_entries(dense, before)), name
        torch.testing.assert_close(moved.unit_rms(shuffled), geometry.unit_rms(dense))
        rows = geometry.coordinates()[units, 0]
        assert torch.equal(moved.coordinates()[units, 0], order[rows]), name
        assert geometry.row_order is None
        if geometry.tiling() is not None:
            old, new = geometry.row_positions(), moved.row_positions()
            old = torch.arange(geometry.shape[0]) if old is None else old
            assert new is not None and torch.equal(new[order], old), name


def test_the_highest_scores_of_each_pool_are_kept() -> None:
    geometry = NM(n=1, m=None, group=1).geometry(2, 8, 0.25)
    scores = torch.tensor([[1.0, 4, 2, 3], [0, 0, 0, 0], [9, 8, 7, 6], [5, 6, 7, 8]])
    assert best_units(geometry, torch.ones(4, dtype=torch.int64), scores).tolist() == [1, 4, 8, 15]
    assert best_units(geometry, torch.tensor([2, 0, 1, 1]), scores).tolist() == [1, 3, 8, 15]


def test_textbook_nm_chunks_where_m_divides_the_inputs() -> None:
    structure = NM(n=2, m=8, group=1)
    geometry = structure.geometry(6, 32, 0.25)
    assert geometry.candidates.tolist() == [8] * (6 * 4)
    entries = geometry.entries(drawn(geometry, structure.initial_counts(geometry, 0.25)))
    mask = scatter_entries(torch.ones(entries.shape), entries, (6, 32))
    assert bool((mask.view(6, 4, 8).sum(2) == 2).all())


def test_diagonals_follow_the_convention_and_transpose_into_themselves() -> None:
    single = Diagonal(bundle=1, stride=1, width=1)
    tall, wide = single.geometry(6, 4, 0.5), single.geometry(4, 6, 0.5)
    for offset in range(6):
        unit = torch.tensor([offset])
        rows, columns = tall.cells(unit)
        assert list(zip(rows[0].tolist(), columns[0].tolist(), strict=True)) == [
            ((c + offset) % 6, c) for c in range(4)
        ]
        wide_rows, wide_columns = wide.cells(unit)
        assert torch.equal(rows, wide_columns) and torch.equal(columns, wide_rows)


def test_stride_classes_hold_whole_residue_classes_of_offsets() -> None:
    for shape in [(12, 8), (8, 12), (8, 8)]:
        classes = Diagonal(bundle="stride", stride=4, width=1).geometry(*shape, 0.5)
        single = Diagonal(bundle=1, stride=1, width=1).geometry(*shape, 0.5)
        for residue in range(4):
            offsets = torch.arange(residue, max(shape), 4)
            ours = classes.entries(torch.tensor([residue])).flatten().sort().values
            assert torch.equal(ours, single.entries(offsets).flatten().sort().values)


def test_a_budget_is_shared_by_largest_remainder() -> None:
    one = torch.ones(4, dtype=torch.int64)
    assert share_budget(6, torch.full((4,), 10), one).tolist() == [2, 2, 1, 1]
    assert share_budget(3, torch.full((4,), 10), one).tolist() == [1, 1, 1, 0]
    # 0.1 * 30 is a little less than 3.
    assert share_budget(0.1 * 30 * 4, torch.full((4,), 30), one).tolist() == [3, 3, 3, 3]


POOLS = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 5, 8])), min_size=1, max_size=9
)


@given(pools=POOLS, density=st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_budget_is_shared_within_one_unit(pools: list[tuple[int, int]], density: float) -> None:
    candidates, sizes = (torch.tensor(column) for column in zip(*pools, strict=True))
    budget = density * int((candidates * sizes).sum())
    counts = share_budget(budget, candidates, sizes)
    assert bool((counts >= 0).all() and (counts <= candidates).all())
    assert abs(int((counts * sizes).sum()) - budget) < int(sizes.max())
    assert bool(((counts - candidates * density).abs() <= 1 + 1e-6).all())


def test_an_impossible_sparsity_is_one_line_that_names_the_key() -> None:
    for structure, shape, density, named in [
        (Block(size=64, balanced=False), (96, 96), 0.1, "sparsity"),
        (Diagonal(bundle="stride", stride=7, width=1), (64, 64), 0.5, "structure.stride"),
        (Diagonal(bundle="stride", stride=4, width=1), (64, 64), 0.1, "sparsity"),
        (Diagonal(bundle=1, stride=4, width=1), (64, 64), 0.001, "sparsity"),
        (NM(n=4, m=None, group=1), (64, 64), 0.01, "sparsity"),
        (NM(n=65, m=None, group=1), (64, 64), 0.5, "structure.n"),
        (NM(n=2, m=4, group=1), (64, 64), 0.1, "structure.m"),
    ]:
        with pytest.raises(UserError, match=rf"^{named}: [^\n]+$"):
            structure.geometry(*shape, density)


def test_the_sparsity_that_an_error_suggests_is_legal() -> None:
    block = Block(size=64, balanced=False)
    with pytest.raises(UserError) as error:
        block.geometry(96, 96, 0.1)
    suggested = float(str(error.value).split("use sparsity <= ")[1].split()[0])
    geometry = block.geometry(96, 96, 1 - suggested)
    assert int(block.initial_counts(geometry, 1 - suggested).sum()) >= 1


def test_bad_hyper_parameters_name_their_key() -> None:
    for build, named in [
        (lambda: Block(size=0, balanced=False), "structure.size"),
        (lambda: NM(n=0, m=None, group=1), "structure.n"),
        (lambda: NM(n=5, m=4, group=1), "structure.n"),
        (lambda: NM(n=1, m=None, group=0), "structure.group"),
        (lambda: Diagonal(bundle="band", stride=1, width=0), "structure.width"),
    ]:
        with pytest.raises(UserError, match=rf"^{named}: "):
            build()
