"""DSB's updates, recomputed entry by entry."""

import math

import pytest
import torch
from torch import Tensor

from dst.small_training import Training, start
from from_yaml import from_yaml
from padst_exp.dst import DSB, Entries, Signals, Topology
from padst_exp.dst.dsb import similar_rows
from padst_exp.layers import sparse_weights
from padst_exp.structures import ShuffledBlock, random_units

Cell = tuple[int, int]


def dropped_by_hand(
    weights: Tensor, active: list[Cell], order: list[int], size: int, number: int
) -> set[Cell]:
    """The smallest entries, but those vetoed by their block."""
    smallest = set(sorted(active, key=lambda cell: (abs(float(weights[cell])), cell))[:number])
    stand = set()
    for start_row in range(0, len(order), size):
        rows = order[start_row : start_row + size]
        columns = sorted({c for r, c in active if r in rows})
        for at in range(0, len(columns), size):
            block = columns[at : at + size]
            for r, c in smallest:
                if r in rows and c in block:
                    in_row = sum((r, other) in smallest for other in block)
                    in_column = sum((other, c) in smallest for other in rows)
                    if in_row >= len(block) / 2 or in_column >= len(rows) / 2:
                        stand.add((r, c))
    return stand


def units_by_hand(scores: Tensor, order: list[int], size: int, counts: list[int]) -> list[int]:
    """The units of the blocks of largest norm, in rows of this order."""
    num_rows, num_columns = scores.shape
    blocks: list[list[tuple[float, int, list[int]]]] = [[] for _ in counts]
    for group, start_row in enumerate(range(0, num_rows, size)):
        rows = order[start_row : start_row + size]
        energy = scores[rows].square().sum(0)
        columns = sorted(range(num_columns), key=lambda c: (-float(energy[c]), c))
        for at in range(0, num_columns, size):
            own = columns[at : at + size]
            pool = 0 if len(rows) == size else 1
            units = [group * num_columns + c for c in own]
            blocks[pool].append((-float(energy[own].sum()), len(blocks[pool]), units))
    chosen = []
    for count, own_blocks in zip(counts, blocks, strict=True):
        units = [unit for _, _, block in sorted(own_blocks) for unit in block]
        chosen += units[:count]
    return sorted(chosen)


def test_an_update_is_rigl_on_entries_and_then_blocks() -> None:
    structure, size, vetoed, moved = ShuffledBlock(size=4), 4, 0, 0
    for seed, shape in enumerate([(16, 16), (12, 24), (18, 20), (16, 18), (8, 8)] * 6):
        geometry = structure.geometry(*shape, 0.4)
        counts = structure.initial_counts(geometry, 0.4)
        generator = torch.Generator().manual_seed(seed)
        geometry = geometry.with_row_order(torch.randperm(shape[0], generator=generator))
        units = random_units(geometry, counts, generator)
        entries = geometry.entries(units)
        active = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.bool)
        active[entries.flatten()] = True
        active = active[:-1].view(shape)
        levels = 4 if seed % 2 else 10_000
        weights = torch.randint(-levels, levels, shape, generator=generator).double() * active
        # A block of small weights, so that some drops stand.
        weights[geometry.entries(units[:4]).flatten() // shape[1]] *= 0.01
        gradients = torch.randint(-levels, levels, shape, generator=generator).double()
        topology = Topology(
            units, geometry.candidates, geometry.unit_sizes, geometry.pool_size, shape, counts
        )
        order = geometry.row_order
        assert order is not None
        signals = Signals(
            magnitude=torch.ones(len(units)), generator=generator, progress=0.1,
            entries=Entries(
                weights=weights, gradients=gradients, active=active, row_order=order
            ),
        )  # fmt: skip
        fraction = 0.25 if seed % 3 else 0.6
        algorithm = from_yaml("dst/dsb", fraction=fraction, stop=1.0)
        change, carry = algorithm.decide(topology, signals, step=10, total=100, carry=0.3)

        cells = [(int(r), int(c)) for r, c in active.nonzero()]
        share = fraction / 2 * (1 + math.cos(math.pi * 0.1))
        number = math.floor(share * len(cells) + 0.3)
        assert carry == pytest.approx(share * len(cells) + 0.3 - number)
        gone = dropped_by_hand(weights, cells, order.tolist(), size, number)
        vetoed += number - len(gone)
        kept = [cell for cell in cells if cell not in gone]
        free = [(r, c) for r in range(shape[0]) for c in range(shape[1]) if (r, c) not in kept]
        free.sort(key=lambda cell: (-abs(float(gradients[cell])), cell))
        mean = sum(abs(float(weights[cell])) for cell in kept) / len(kept)
        scores = torch.zeros(shape, dtype=torch.float64)
        for cell in kept:
            scores[cell] = abs(weights[cell])
        for cell in free[: len(gone)]:
            scores[cell] = mean
        mask = torch.zeros(shape, dtype=torch.bool)
        for cell in kept + free[: len(gone)]:
            mask[cell] = True
        assert change.row_order is not None
        assert torch.equal(change.row_order, similar_rows(mask))
        rows = change.row_order.tolist()
        assert change.active.tolist() == units_by_hand(scores, rows, size, counts.tolist()), seed
        moved += bool(gone)
    assert vetoed > 50 and moved > 10


def test_like_rows_become_neighbours() -> None:
    patterns = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = patterns[torch.arange(16) % 4]
    order = similar_rows(mask)
    assert torch.equal(order.sort().values, torch.arange(16))
    assert all(len((own % 4).unique()) == 1 for own in order.split(4))
    assert similar_rows(torch.zeros(1, 3, dtype=torch.bool)).tolist() == [0]
    assert len(similar_rows(torch.zeros(5, 3, dtype=torch.bool))) == 5


def test_training_changes_rows_columns_and_nothing_else() -> None:
    dsb = from_yaml("dst/dsb", interval=4, stop=0.9, fraction=0.6)
    assert isinstance(dsb, DSB)
    training = start(dsb, ShuffledBlock(size=8), steps=24, ema_decay=0.9)
    before: dict[str, Tensor] = {}
    orders = set()

    def check(now: Training) -> None:
        for name, weight in sparse_weights(now.model).items():
            assert torch.equal(weight.topology().counts(), weight.target)
            groups = torch.bincount(weight.active.long() // weight.shape[1])
            assert bool((groups % 8 == 0).all())
            state = now.state.optimizer.state[weight.values]
            assert state["exp_avg"].shape == weight.values.shape
            matrix, mask = weight.matrix().detach(), torch.zeros(weight.shape)
            mask.flatten()[weight.entries().flatten()] = 1
            if now.state.step % 4 == 0 and now.state.step < 22:
                assert weight.row_order is not None
                orders.add(tuple(weight.row_order.tolist()))
                averaged = sparse_weights(now.state.average.model)[name]  # type: ignore[union-attr]
                assert torch.equal(averaged.active, weight.active)
                assert torch.equal(averaged.row_order, weight.row_order)  # type: ignore[arg-type]
                # An entry that was active before has its value, an optimizer step later.
                both = (mask > 0) & (before[name] != 0)
                assert bool(both.any())
                assert float((matrix - before[name])[both].abs().max()) < 0.05
                new = (mask > 0) & (before[name] == 0)
                assert bool((matrix[new] == 0).all())
            before[name] = matrix

    losses = training.run(24, check).state.losses
    assert len(orders) > 4
    assert sum(losses[-6:]) < sum(losses[:6])


def test_a_frozen_weight_computes_what_its_matrix_says() -> None:
    training = start(from_yaml("dst/dsb", interval=4, stop=0.9), ShuffledBlock(size=8), steps=24)
    training.run(9)
    layer = training.model[0]
    x = torch.randn(5, 32)
    for backend in layer.backends(torch.device("cpu")):
        layer.use_backend(backend)
        torch.testing.assert_close(
            layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias),
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip
