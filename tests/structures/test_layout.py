import pytest
import torch

from padst_exp.errors import UserError
from padst_exp.structures import NM, Block, Diagonal, Unstructured, gather_entries, scatter_entries
from padst_exp.structures.layout import share_budget
from structure_cases import CASE_IDS, CASES, STRUCTURES

DENSITY = 0.25

each_case = pytest.mark.parametrize(("name", "shape"), CASES, ids=CASE_IDS)


@each_case
def test_units_tile_the_weight(name: str, shape: tuple[int, int]) -> None:
    layout = STRUCTURES[name].layout(*shape, DENSITY)
    entries = layout.entries(layout.unit_ids()).flatten()
    inside = entries[entries < shape[0] * shape[1]]
    assert torch.equal(inside.sort().values, torch.arange(shape[0] * shape[1]))


@each_case
def test_unit_sizes_count_the_entries_of_each_unit(name: str, shape: tuple[int, int]) -> None:
    layout = STRUCTURES[name].layout(*shape, DENSITY)
    units = layout.unit_ids()
    inside = (layout.entries(units) < shape[0] * shape[1]).sum(1)
    assert torch.equal(inside, layout.unit_sizes[units // layout.pool_size])


@each_case
def test_budget_is_met_within_one_unit(name: str, shape: tuple[int, int]) -> None:
    layout = STRUCTURES[name].layout(*shape, DENSITY)
    budget = DENSITY * shape[0] * shape[1]
    # An N:M row cannot hold a part of a chunk; its unit of choice is n inputs for all rows.
    step = 2 * shape[0] if name.startswith("nm") else layout.unit_size
    assert abs(layout.num_entries - budget) <= step / 2 + 1e-9 or name in {"diag-band"}
    assert abs(layout.num_entries - budget) < step
    assert bool((layout.counts <= layout.candidates).all())


@each_case
def test_drawn_topology_keeps_the_count_of_every_pool(name: str, shape: tuple[int, int]) -> None:
    layout = STRUCTURES[name].layout(*shape, DENSITY)
    active = layout.random_units(torch.Generator().manual_seed(0))
    counts = torch.bincount(active // layout.pool_size, minlength=layout.num_pools)
    assert torch.equal(counts, layout.counts)
    assert bool((active.diff() > 0).all())
    assert bool((active % layout.pool_size < layout.candidates[active // layout.pool_size]).all())


@each_case
def test_unit_rms_is_the_root_mean_square_of_each_units_entries(
    name: str, shape: tuple[int, int]
) -> None:
    layout = STRUCTURES[name].layout(*shape, DENSITY)
    dense = torch.randn(shape, dtype=torch.float64)
    table = layout.unit_rms(dense).flatten()
    units = layout.unit_ids()
    for unit in units[:: max(1, len(units) // 20)]:
        entries = layout.entries(unit[None])[0]
        values = dense.flatten()[entries[entries < dense.numel()]]
        assert table[unit] == pytest.approx(float(values.square().mean().sqrt()))


@each_case
def test_tiles_cover_the_same_cells_as_frames(name: str, shape: tuple[int, int]) -> None:
    layout = STRUCTURES[name].layout(*shape, DENSITY)
    units = layout.random_units(torch.Generator().manual_seed(0))
    tiles = layout.tiles(units)
    if tiles is None:
        assert layout.frame[2] < 8 or name.startswith("diag"), "only low tiles go without"
        return
    columns, owner = tiles
    rows, frame_columns = layout.cells(units)
    count, width, height = layout.frame
    assert torch.equal(
        columns.flatten(), frame_columns.view(-1, count, width, height)[..., 0].flatten()
    )
    positions = layout.row_positions()
    positions = torch.arange(shape[0]) if positions is None else positions
    inside = rows < shape[0]
    expected_owner = owner.view(-1, count, 1, 1).expand(-1, count, width, height).flatten(1)
    assert torch.equal(positions[rows[inside]] // height, expected_owner[inside])


def test_best_units_keeps_the_highest_scores_of_each_pool() -> None:
    layout = NM(n=1, m=None, group=1).layout(2, 8, 0.25)
    scores = torch.tensor([[1.0, 4, 2, 3], [0, 0, 0, 0], [9, 8, 7, 6], [5, 6, 7, 8]])
    assert layout.best_units(scores).tolist() == [1, 4, 8, 15]


def test_textbook_nm_chunks_when_m_divides_the_inputs() -> None:
    layout = NM(n=2, m=8, group=1).layout(6, 32, 0.25)
    assert layout.candidates.tolist() == [8] * (6 * 4)
    dense = torch.ones(6, 32)
    entries = layout.entries(layout.random_units(torch.Generator().manual_seed(0)))
    mask = scatter_entries(gather_entries(dense, entries), entries, (6, 32))
    assert bool((mask.view(6, 4, 8).sum(2) == 2).all())


def test_diagonals_follow_the_convention_and_transpose_into_themselves() -> None:
    single = Diagonal(bundle=1, stride=1, width=1)
    tall, wide = single.layout(6, 4, 0.5), single.layout(4, 6, 0.5)
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
        classes = Diagonal(bundle="stride", stride=4, width=1).layout(*shape, 0.5)
        single = Diagonal(bundle=1, stride=1, width=1).layout(*shape, 0.5)
        for residue in range(4):
            offsets = torch.arange(residue, max(shape), 4)
            ours = classes.entries(torch.tensor([residue])).flatten().sort().values
            assert torch.equal(ours, single.entries(offsets).flatten().sort().values)


def test_share_budget_by_largest_remainder() -> None:
    one = torch.ones(4, dtype=torch.int64)
    assert share_budget(6, torch.full((4,), 10), one).tolist() == [2, 2, 1, 1]
    assert share_budget(3, torch.full((4,), 10), one).tolist() == [1, 1, 1, 0]
    uneven = share_budget(30, torch.tensor([10, 2]), torch.tensor([8, 4]))
    assert abs(int((uneven * torch.tensor([8, 4])).sum()) - 30) <= 4


def test_symmetry_classes() -> None:
    assert Block(size=4, balanced=False).layout(8, 12, 0.5).symmetry("in").tolist() == [
        *[0] * 4,
        *[1] * 4,
        *[2] * 4,
    ]
    shared = NM(n=1, m=None, group=4).layout(8, 12, 0.25)
    assert shared.symmetry("in").tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert shared.symmetry("out").tolist() == [0] * 4 + [1] * 4
    assert Diagonal(bundle=1, stride=1, width=1).layout(8, 8, 0.25).symmetry("in") is None
    assert set(Unstructured().layout(8, 8, 0.5).symmetry("in").tolist()) == {0}


@pytest.mark.parametrize(
    ("structure", "shape", "density", "named"),
    [
        (Block(size=64, balanced=False), (96, 96), 0.1, "sparsity"),
        (Diagonal(bundle="stride", stride=7, width=1), (64, 64), 0.5, "structure.stride"),
        (Diagonal(bundle="stride", stride=4, width=1), (64, 64), 0.1, "sparsity"),
        (Diagonal(bundle=1, stride=4, width=1), (64, 64), 0.001, "sparsity"),
        (NM(n=4, m=None, group=1), (64, 64), 0.01, "sparsity"),
        (NM(n=65, m=None, group=1), (64, 64), 0.5, "structure.n"),
        (NM(n=2, m=4, group=1), (64, 64), 0.1, "structure.m"),
    ],
)
def test_impossible_sparsity_is_one_line_that_names_the_key(
    structure: Block | Diagonal | NM, shape: tuple[int, int], density: float, named: str
) -> None:
    with pytest.raises(UserError, match=rf"^{named}: [^\n]+$"):
        structure.layout(*shape, density)


def test_the_sparsity_an_error_suggests_is_legal() -> None:
    block = Block(size=64, balanced=False)
    with pytest.raises(UserError) as error:
        block.layout(96, 96, 0.1)
    suggested = float(str(error.value).split("use sparsity <= ")[1].split()[0])
    assert block.layout(96, 96, 1 - suggested).num_active >= 1


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Block(size=0, balanced=False), "structure.size"),
        (lambda: NM(n=0, m=None, group=1), "structure.n"),
        (lambda: NM(n=5, m=4, group=1), "structure.n"),
        (lambda: NM(n=1, m=None, group=0), "structure.group"),
        (lambda: Diagonal(bundle="band", stride=1, width=0), "structure.width"),
    ],
)
def test_bad_hyper_parameters_name_their_key(build: object, named: str) -> None:
    assert callable(build)
    with pytest.raises(UserError, match=rf"^{named}: "):
        build()
