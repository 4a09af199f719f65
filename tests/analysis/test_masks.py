"""Graphs of masks: metrics by their definition, products of masks, linear regions."""

import math
import statistics

import pytest
import torch
from torch import Tensor, nn

from padst_exp.analysis.masks import connections, consecutive, mask
from padst_exp.analysis.paths import mixing, shuffled
from padst_exp.analysis.regions import Net, bound, count_regions, random_net, sample_points
from padst_exp.analysis.spectrum import spectrum, top_two
from padst_exp.permutations import Permutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Block, Unstructured


def bernoulli(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < 0.1


def test_singular_values() -> None:
    for shape in ((7, 5), (5, 7), (6, 6)):
        matrix = torch.randn(shape)
        values = torch.linalg.svdvals(matrix)
        assert top_two(matrix) == pytest.approx((float(values[0]), float(values[1])), rel=1e-5)
        # The second one is the third largest eigenvalue of the bipartite graph, by magnitude.
        zeros = [torch.zeros(shape[0], shape[0]), torch.zeros(shape[1], shape[1])]
        graph = torch.cat([torch.cat([zeros[1], matrix.t()], 1), torch.cat([matrix, zeros[0]], 1)])
        eigenvalues = torch.linalg.eigvalsh(graph).abs().sort(descending=True).values
        assert top_two(matrix)[1] == pytest.approx(float(eigenvalues[2]), rel=1e-5)
    assert top_two(torch.ones(1, 4)) == (2.0, 0.0)


def test_vectors_of_the_ramanujan_gap() -> None:
    full = torch.ones(9, 20, dtype=torch.bool)
    metrics = spectrum(full, torch.ones(9, 20))
    assert metrics.gap == pytest.approx(math.sqrt(19) + math.sqrt(8), abs=1e-5)
    assert metrics.imdb == pytest.approx(metrics.gap)
    assert metrics.weighted_gap == metrics.imsg == pytest.approx(math.sqrt(180), abs=1e-5)
    for rows, columns, second, gap in ((512, 4608, 27.11, 1.44), (202, 1818, 17.01, 0.78)):
        random = bernoulli(rows, columns, 0)
        assert top_two(random)[1] == pytest.approx(second, rel=0.02)
        theory = math.sqrt(0.1 * 0.9) * (math.sqrt(rows) + math.sqrt(columns))
        assert top_two(random)[1] == pytest.approx(theory, rel=0.02)
        if rows < 300:
            assert spectrum(random, random.float()).gap == pytest.approx(gap, abs=0.25)
    thin = torch.eye(8, dtype=torch.bool)
    assert spectrum(thin, torch.eye(8)).gap is spectrum(thin, torch.eye(8)).imdb is None


def test_subgraphs_by_definition() -> None:
    random = bernoulli(40, 300, 3)
    weights = torch.randn(40, 300) * random
    gaps, weighted = [], []
    for degree in range(1, 41):
        columns = [c for c in range(300) if int(random[:, c].sum()) == degree]
        if len(columns) < 3:
            continue
        part = random[:, columns]
        part = part[part.any(1)].double()
        left, right = float(part.sum(0).mean()), float(part.sum(1).mean())
        if min(left, right) < 3:
            continue
        second = float(torch.linalg.svdvals(part)[1])
        gaps.append(math.sqrt(left - 1) + math.sqrt(right - 1) - second)
        values = torch.linalg.svdvals(weights[:, columns].abs().double())
        weighted.append(float(values[0] - values[1]))
    metrics = spectrum(random, weights)
    assert len(gaps) > 3
    assert metrics.imdb == pytest.approx(statistics.fmean(gaps))
    assert metrics.imsg == pytest.approx(statistics.fmean(weighted))
    values = torch.linalg.svdvals(weights.abs().double())
    assert metrics.weighted_gap == pytest.approx(float(values[0] - values[1]))


def blocks(count: int, size: int) -> Tensor:
    return torch.block_diag(*[torch.ones(size, size)] * count).bool()


def test_one_mask_is_blind_to_permutations_and_products_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [blocks(4, 8)] * 4
    orders = [torch.randperm(32, generator=generator) for _ in masks]
    permuted = [each[:, order] for each, order in zip(masks, orders, strict=True)]
    weights = torch.randn(32, 32) * masks[0]
    for order, each in zip(orders, permuted, strict=True):
        before, after = spectrum(masks[0], weights), spectrum(each, weights[:, order])
        assert vars(after) == pytest.approx(vars(before), abs=1e-9)

    apart, mixed = mixing(masks), mixing(permuted)
    assert [row.reach for row in apart] == [0.25] * 4
    assert [row.ratio for row in apart] == pytest.approx([1.0] * 4)
    assert [row.layers for row in mixed] == [1, 2, 3, 4]
    assert mixed[0].reach == 0.25 and mixed[0].ratio == pytest.approx(1)
    assert mixed[1].reach > 0.8 and mixed[3].reach == 1
    assert mixed[3].ratio < mixed[1].ratio < 0.6
    random = shuffled(masks, generator)
    assert [int(each.sum()) for each in random] == [256] * 4
    assert not torch.equal(random[0], masks[0])


def test_masks_of_a_model_follow_each_other() -> None:
    model = nn.Sequential()
    model.add_module("a", nn.Conv2d(4, 8, 3, padding=1))
    beside = nn.Sequential()
    beside.add_module("downsample", nn.Sequential(nn.Conv2d(8, 8, 1)))
    model.add_module("shortcut", beside)
    model.add_module("b", nn.Conv2d(8, 6, 1))
    model.add_module("other", nn.Conv2d(5, 6, 1))
    report = sparsify(
        model,
        [Rule("a"), Rule("b"), Rule("other"), Rule("shortcut.downsample.0")],
        structure=Unstructured(),
        density=0.3,
    )
    assert list(consecutive(model)) == ["a", "b"]
    layer = report.model_layers["a"]
    seen = connections(layer)[0]
    assert torch.equal(seen, layer.weight.detach().ne(0).any(2).any(2))
    assert int(mask(layer.parts()[0]).sum()) == report.layers[0].parameters


def test_connections_are_those_of_the_dense_weight() -> None:
    model = nn.Sequential(nn.Linear(12, 24))
    report = sparsify(
        model, [Rule("0", split=2)], structure=Block(size=4, balanced=False), density=0.3
    )
    layer = report.model_layers["0"]
    layer.input_permutation = Permutation(torch.randperm(12))
    layer.output_permutations[1] = Permutation(torch.randperm(12))
    layer.index()
    first, second = connections(layer)
    assert torch.equal(torch.cat([first, second]), layer.weight.detach() != 0)
    plain = connections(layer, permuted=False)
    assert torch.equal(plain[0], mask(layer.parts()[0])) and not torch.equal(plain[1], second)


def test_linear_regions_of_what_can_be_counted_by_thought() -> None:
    generator = torch.Generator().manual_seed(1)
    points = sample_points(60_000, 3, generator)
    general = Net([torch.randn(3, 3, generator=generator)], [torch.zeros(3)], [None])
    assert count_regions(general, points) == [8], "as many as sides of three planes"

    # Without mixing, units are networks of one input each: their regions multiply.
    alone = random_net(torch.eye(3, dtype=torch.bool), 2, generator, permuted=False)
    single = [
        count_regions(
            Net(
                [weight[i : i + 1, i : i + 1] for weight in alone.weights],
                [bias[i : i + 1] for bias in alone.biases],
                [None, None],
            ),
            points[:, i : i + 1],
        )
        for i in range(3)
    ]
    assert count_regions(alone, points) == [
        math.prod(counts) for counts in zip(*single, strict=True)
    ]

    full = random_net(torch.ones(3, 3, dtype=torch.bool), 2, generator, permuted=True)
    assert full.orders[0] is None and full.orders[1] is not None
    counts = count_regions(full, points)
    assert counts[0] == 8 and counts[0] < counts[1] <= bound(3, 2, 3, permuted=False)[1] == 64


def test_bound() -> None:
    assert bound(4, 2, 4, permuted=False) == [16, 256]
    assert bound(4, 3, 2, permuted=False) == [11, 121, 1331]
    assert bound(4, 3, 2, permuted=True) == [11, 11 * 16, 11 * 16 * 16]
