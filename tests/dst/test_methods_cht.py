"""Scores of Cannistraci-Hebb training against enumerated paths, loops and frequencies."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from dst.small_training import start
from from_yaml import from_yaml
from padst_exp.dst import CH2L3, CH3L3, DropGrow, Signals, SoftMagnitude, Topology
from padst_exp.structures import NM, Block, FanIn, Geometry, Unstructured

Graph = list[list[int]]


def graphs() -> list[Graph]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(5, 7, 0.3), (8, 6, 0.5), (9, 9, 0.2), (1, 6, 0.5), (6, 5, 0.9), (7, 8, 0.4)]
    found = [(torch.rand(r, c, generator=generator) < d).int().tolist() for r, c, d in sizes]
    return [*found, [[0] * 4] * 3]


def by_paths(graph: Graph) -> dict[tuple[int, int], float]:
    """CH3-L3p of every absent link, path by path and neighbour by neighbour."""
    rows, columns = range(len(graph)), range(len(graph[0]))
    of_row = {r: {c for c in columns if graph[r][c]} for r in rows}
    of_column = {c: {r for r in rows if graph[r][c]} for c in columns}
    scores = {}
    for u, v in product(rows, columns):
        if graph[u][v]:
            continue
        paths = [(z1, z2) for z1 in of_row[u] for z2 in of_column[v] if z1 in of_row[z2]]
        community_columns = {z1 for z1, _ in paths}
        community_rows = {z2 for _, z2 in paths}
        total = 0.0
        for z1, z2 in paths:
            e1 = len(of_column[z1] - {u} - community_rows)
            e2 = len(of_row[z2] - {v} - community_columns)
            total += 1 / math.sqrt((1 + e1) * (1 + e2))
        scores[u, v] = total
    return scores


def by_loops(graph: Graph) -> dict[tuple[int, int], float]:
    """CH2-L3n of every absent link: R A + A R'^T, one sum at a time."""
    columns = [list(column) for column in zip(*graph, strict=True)]

    def ratio(lists: Graph, i: int, j: int) -> float:
        common = sum(a * b for a, b in zip(lists[i], lists[j], strict=True))
        external = max(sum(lists[j]) - common, 1) - 1
        return (common + 1) / (external + 1) if common else 0.0

    scores = {}
    for u, v in product(range(len(graph)), range(len(columns))):
        if not graph[u][v]:
            by_row = sum(ratio(graph, u, z) * graph[z][v] for z in range(len(graph)))
            by_column = sum(graph[u][z] * ratio(columns, v, z) for z in range(len(columns)))
            scores[u, v] = by_row + by_column
    return scores


def test_scores_equal_those_of_enumerated_paths() -> None:
    compared = 0
    for graph in graphs():
        for score, expected in (
            (CH3L3(soft=False), by_paths(graph)),
            (CH2L3(soft=False), by_loops(graph)),
        ):
            found = score.paths(torch.tensor(graph, dtype=torch.float32))
            for (u, v), value in expected.items():
                assert float(found[u, v]) == pytest.approx(value, rel=1e-5, abs=1e-6)
                compared += value > 0
    assert compared > 100


def table(geometry: Geometry, active: list[int]) -> tuple[Topology, Tensor]:
    topology = Topology(
        torch.tensor(active), geometry.candidates, geometry.unit_sizes, geometry.pool_size,
        geometry.shape[0] * geometry.shape[1], torch.bincount(
            torch.tensor(active) // geometry.pool_size, minlength=geometry.num_pools
        ),
    )  # fmt: skip
    return topology, geometry.coordinates()


def test_units_of_any_grid_are_links_between_their_rows_and_columns() -> None:
    for structure, shape, nodes in [
        (Unstructured(), (6, 9), (6, 9)),
        (FanIn(group=4), (10, 7), (3, 7)),
        (NM(n=1, m=None, group=4), (8, 9), (2, 9)),
        (Block(size=4, balanced=False), (10, 9), (3, 3)),
        (Block(size=4, balanced=True), (10, 9), (3, 3)),
    ]:
        geometry = structure.geometry(*shape, 0.4)
        units = geometry.unit_ids().tolist()
        generator = torch.Generator().manual_seed(1)
        active = sorted(u for u in units if torch.rand((), generator=generator) < 0.4)
        topology, coordinates = table(geometry, active)
        signals = Signals(
            magnitude=torch.ones(len(active)), coordinates=coordinates,
            generator=torch.Generator().manual_seed(0), progress=0.0,
        )  # fmt: skip
        scores = CH2L3(soft=False)(topology, signals).flatten()
        rows = sorted({int(r) for r, _ in coordinates[units]})
        columns = sorted({int(c) for _, c in coordinates[units]})
        assert (len(rows), len(columns)) == nodes
        graph = [[0] * nodes[1] for _ in range(nodes[0])]
        place = {}
        for unit in units:
            row, column = coordinates[unit].tolist()
            place[rows.index(row), columns.index(column)] = unit
            graph[rows.index(row)][columns.index(column)] = int(unit in active)
        for cell, value in by_loops(graph).items():
            found = float(scores[place[cell]])
            assert found == pytest.approx(value, rel=1e-5) if value else -1 <= found < 0


def one_pool(weights: Tensor, seed: int, progress: float) -> tuple[Topology, Signals]:
    """A weight `[R, C]` whose first entries are active, with these magnitudes."""
    geometry = Unstructured().geometry(4, 5, 0.5)
    topology, coordinates = table(geometry, list(range(len(weights))))
    signals = Signals(
        magnitude=weights, coordinates=coordinates, progress=progress,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return topology, signals


def test_who_stays_is_drawn_with_odds_of_powers() -> None:
    for relative in (False, True):
        check_odds(relative)


def check_odds(relative: bool) -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0, 1.0])
    score = SoftMagnitude(start=1.0, end=3.0, relative=relative)
    assert score.needs == ({"coordinates"} if relative else set())
    for progress, power in ((0.0, 1), (0.5, 2), (1.0, 3)):
        strength = weights.clone()
        if relative:
            # Five columns: the first five are one row, the last begins the next.
            rows = torch.tensor([7.0] * 5 + [1.0])
            columns = torch.tensor([2.0, 2.0, 3.0, 1.0, 1.0, 2.0])
            strength = weights / rows + weights / columns
        odds = strength**power / (strength**power).sum()
        drawn = torch.zeros(6)
        for seed in range(1000):
            topology, signals = one_pool(weights, seed, progress)
            scores = score(topology, signals)
            assert bool(scores.isfinite().all())
            drawn[scores.argmax()] += 1 / 1000
        torch.testing.assert_close(drawn, odds, atol=0.05, rtol=0)


def test_what_comes_is_drawn_in_proportion_or_is_the_best() -> None:
    weights = torch.ones(12)
    topology, signals = one_pool(weights, 0, 0.0)
    best = CH2L3(soft=False)(topology, signals).flatten()[12:]
    assert bool((best > 0).any())
    drawn = torch.zeros(8)
    for seed in range(1000):
        topology, signals = one_pool(weights, seed, 0.0)
        drawn[CH2L3(soft=True)(topology, signals).flatten()[12:].argmax()] += 1 / 1000
    expected = best.clamp(min=0)
    torch.testing.assert_close(drawn, expected / expected.sum(), atol=0.05, rtol=0)


def test_absent_paths_fall_back_to_chance() -> None:
    # One link closes no path: all candidates are alike.
    seen = set()
    for seed in range(40):
        for soft in (False, True):
            topology, signals = one_pool(torch.ones(1), seed, 0.0)
            scores = CH3L3(soft=soft)(topology, signals).flatten()
            assert bool((scores[1:] < 0).all() and scores.isfinite().all())
            seen.add(int(scores[1:].argmax()))
    assert len(seen) > 10


def test_methods_train_and_chtss_ends_at_its_target() -> None:
    for name in ("cht", "chts", "chtss"):
        algorithm = from_yaml(f"dst/{name}", interval=4)
        assert isinstance(algorithm, DropGrow) and algorithm.needs == {"coordinates"}
        for structure in (Unstructured(), Block(size=4, balanced=False)):
            training = start(algorithm, structure, steps=20)
            first = training.report.density("layers")
            training.run(20)
            assert training.state.tracker.updates == (4 if name == "chtss" else 3)
            assert sum(training.state.tracker.replaced.values()) > 0
            for layer in training.report.model_layers.values():
                for weight in layer.parts():
                    assert torch.equal(weight.topology().counts(), weight.target)
            last = training.report.density("layers")
            assert first == pytest.approx(0.5, abs=0.05) if name == "chtss" else first == last
