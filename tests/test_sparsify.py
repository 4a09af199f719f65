import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dst_cases import rigl, set_algorithm
from padst_exp.dst import Change, Cubic
from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear, layer_densities, sparse_weights
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import Baseline, Rule, sparsify
from padst_exp.structures import NM, Block, Dense, FanIn, Unstructured
from permutation_cases import learned


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 32)
        self.qkv = nn.Linear(32, 96)
        self.fc1 = nn.Linear(32, 64)
        self.fc2 = Conv1D(32, 64)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + sum(self.qkv(x).chunk(3, dim=-1))
        return self.head(self.norm(x + self.fc2(self.fc1(x).relu())))


RULES = [Rule("qkv", split=3), Rule("fc?")]
SIZE = 96 * 32 + 2 * 64 * 32


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def test_full_density_computes_what_the_dense_model_did() -> None:
    tokens = torch.randint(0, 11, (2, 5))
    model = toy()
    sparsify(model, RULES, structure=Unstructured(), density=1.0)
    torch.testing.assert_close(model(tokens), toy()(tokens))


def test_the_report_counts_exactly_and_keeps_up_with_changes() -> None:
    model = toy()
    report = sparsify(
        model, RULES, structure=Block(size=4, balanced=False), density=0.25, algorithm=rigl()
    )
    names = [layer.name for layer in report.layers]
    assert names == [
        "qkv.weights.0", "qkv.weights.1", "qkv.weights.2", "fc1.weights.0", "fc2.weights.0"
    ]  # fmt: skip
    assert all(isinstance(getattr(model, name), SparseLinear) for name in ("qkv", "fc1", "fc2"))
    for layer, weight in zip(report.layers, sparse_weights(model).values(), strict=True):
        assert layer.parameters == int((weight.matrix() != 0).sum()) == weight.values.numel()
        assert layer.density == layer.parameters / (layer.shape[0] * layer.shape[1]) == 0.25
        assert layer.macs_dense == layer.shape[0] * layer.shape[1]
        assert not layer.static
    total = sum(p.numel() for p in toy().parameters())
    assert report.density("layers") == 0.25
    assert report.density("model") == pytest.approx(1 - 0.75 * SIZE / total)
    # Half of the units of one weight leave.
    weight = sparse_weights(model)["fc1.weights.0"]
    weight.adopt(Change(weight.active.long()[::2]))
    assert report.layers[3].density == 0.125 and report.layers[3].density_asked == 0.25
    assert report.density("layers") == pytest.approx(0.25 - 0.125 * 64 * 32 / SIZE)
    assert report.to_dict()["density_of_layers"] == report.density("layers")


def test_the_report_compares_with_the_baseline_it_is_given() -> None:
    baseline = Baseline(parameters=100_000, macs=20_000)
    report = sparsify(toy(), RULES, structure=Unstructured(), density=0.25, baseline=baseline)
    assert report.density("layers") == pytest.approx(0.25 * SIZE / 20_000)
    assert report.density("model") == pytest.approx(1 - (20_000 - 0.25 * SIZE) / 100_000)


def test_a_low_rank_companion_is_paid_for_by_fewer_entries() -> None:
    model = toy()
    before = sum(p.numel() for p in model.parameters())
    report = sparsify(model, RULES, structure=Unstructured(), density=0.25, low_rank=4)
    assert report.density("layers") == pytest.approx(0.25, abs=1e-3)
    after = sum(p.numel() for p in model.parameters())
    assert before - after == pytest.approx(0.75 * SIZE, abs=5)
    # It starts at zero, and is as dense as it takes parameters.
    assert not model.qkv.companion.matrix().any()
    for layer in report.layers:
        assert layer.density < 0.25 and layer.companion > 0
    with pytest.raises(UserError, match=r"^low_rank: expected at most \d+, .*, got 20 \(") as told:
        sparsify(toy(), RULES, structure=Unstructured(), density=0.25, low_rank=20)
    highest = int(str(told.value).split()[4].strip(","))
    sparsify(toy(), RULES[-1:], structure=Unstructured(), density=0.25, low_rank=highest)
    with pytest.raises(UserError, match=r"^low_rank: expected a rank of at least 0, got -1$"):
        sparsify(toy(), RULES, structure=Unstructured(), density=0.25, low_rank=-1)


def test_an_algorithm_that_shrinks_starts_at_its_own_density_and_knows_where_to_end() -> None:
    shrinking = rigl(counts=Cubic(start=0.75, begin=0.0, end=0.5))
    report = sparsify(
        model := toy(), RULES, structure=FanIn(group=8), density=0.25, algorithm=shrinking
    )
    assert report.density("layers") == 0.75
    for layer, weight in zip(report.layers, sparse_weights(model).values(), strict=True):
        assert layer.density_asked == 0.25 and layer.density == 0.75
        topology = weight.topology()
        assert torch.equal(topology.counts(), 3 * topology.target)


def test_layers_with_nothing_to_decide_are_called_static() -> None:
    def static(density: float) -> list[bool]:
        structure = Block(size=16, balanced=False)
        report = sparsify(toy(), RULES, structure=structure, density=density, algorithm=rigl())
        return [layer.static for layer in report.layers]

    assert static(1.0) == [True] * 5
    assert static(0.5) == [False] * 5  # of 8 blocks in fc1 and fc2 and 4 in each projection
    report = sparsify(toy(), RULES, structure=Unstructured(), density=0.5)
    assert all(layer.static for layer in report.layers), "nobody changes them"


def test_rows_are_scaled_to_their_own_fan_in() -> None:
    for storage in ("packed", "masked"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(400, 300, bias=False))
        expected = float(model[0].weight.detach().norm(dim=1).mean())
        sparsify(model, [Rule("0")], structure=Unstructured(), density=0.1, storage=storage)
        norms = sparse_weights(model)["0.weights.0"].matrix().detach().norm(dim=1)
        # Rows have different fan-ins here, yet about the same norm as the dense ones.
        assert float(norms.mean()) == pytest.approx(expected, rel=0.05)
        assert float(norms.std()) < 0.2 * expected


def test_a_magnitude_topology_keeps_the_largest_units() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    dense = model[0].weight.detach().clone()
    sparsify(
        model, [Rule("0")], structure=Unstructured(), density=0.25, topology="magnitude",
        rescale=False,
    )  # fmt: skip
    kept = sparse_weights(model)["0.weights.0"].matrix().detach()
    smallest_kept = kept[kept != 0].abs().min()
    assert bool((dense[kept == 0].abs() <= smallest_kept).all())
    assert torch.equal(kept[kept != 0], dense[kept != 0])


def test_the_seed_decides_topologies_and_zero_is_a_seed() -> None:
    models = [toy() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        sparsify(model, RULES, structure=Unstructured(), density=0.25, seed=seed)
    first, same, other = (sparse_weights(model)["fc1.weights.0"].active for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_fused_projections_share_one_input_permutation() -> None:
    model = toy()
    sparsify(
        model, RULES, structure=NM(n=1, m=None, group=8), density=0.25,
        learner=learned(side="auto"),
    )  # fmt: skip
    qkv = model.qkv
    assert isinstance(qkv, SparseLinear)
    assert qkv.input_permutation is not None and qkv.input_permutation.size == 32
    assert all(isinstance(output, nn.Identity) for output in qkv.output_permutations)


def test_auto_permutes_the_side_that_suits_the_structure() -> None:
    report = sparsify(
        toy(), RULES, structure=Unstructured(), density=0.25, learner=RandomPermutation(side="auto")
    )
    sides = {layer.name: layer.side for layer in report.layers}
    # The shorter one, it costs d * d.
    assert sides["fc1.weights.0"] == "in" and sides["fc2.weights.0"] == "out"
    for structure in (NM(n=1, m=None, group=8), FanIn(group=8)):
        square = nn.Sequential(nn.Linear(32, 32))
        report = sparsify(
            square, [Rule("0")], structure=structure, density=0.25,
            learner=RandomPermutation(side="auto"),
        )  # fmt: skip
        # Which rows share their inputs says more than which inputs share a chunk.
        assert report.layers[0].side == "out"
    report = sparsify(toy(), RULES, structure=Unstructured(), density=0.25)
    assert {layer.side for layer in report.layers} == {"none"}


def test_a_dense_structure_leaves_the_model_alone() -> None:
    model = toy()
    report = sparsify(model, RULES, structure=Dense(), density=0.1, algorithm=set_algorithm())
    assert not sparse_weights(model) and report.density("layers") == report.density("model") == 1


def test_mistakes_are_one_line_that_says_where() -> None:
    for rules, message in [
        ([Rule("blocks.*")], r"matches no layer of the model; layers that can be sparse are qkv"),
        ([Rule("norm")], "only linear layers, .* can be made sparse, here qkv, fc1, fc2, head"),
        ([Rule("head")], "tied"),
        ([Rule("embedding")], "only linear layers"),
        ([Rule("fc1", split=5)], "does not divide"),
    ]:
        with pytest.raises(UserError, match=rf"^sparse: pattern [^\n]*{message}[^\n]*$"):
            sparsify(toy(), rules, structure=Unstructured(), density=0.5)
    with pytest.raises(UserError, match=r"layer qkv\.weights\.0"):
        sparsify(toy(), RULES, structure=Block(size=32, balanced=False), density=0.1)


SHAPES = {"wide": (64, 256), "tall": (256, 64), "small": (16, 16)}


def test_erk_keeps_the_total_and_spares_small_layers() -> None:
    densities = layer_densities(SHAPES, 0.2, "erk")
    sizes = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
    kept = sum(densities[name] * size for name, size in sizes.items())
    assert kept == pytest.approx(0.2 * sum(sizes.values()))
    assert densities["small"] > densities["wide"] == pytest.approx(densities["tall"])
    assert max(layer_densities(SHAPES, 0.6, "erk").values()) <= 1


def test_an_explicit_distribution_overrides_by_pattern() -> None:
    assert layer_densities(SHAPES, 0.2, {"s*": 0.5}) == {"wide": 0.2, "tall": 0.2, "small": 0.5}
    with pytest.raises(UserError, match=r"^distribution: pattern 'x\*' matches no"):
        layer_densities(SHAPES, 0.2, {"x*": 0.5})
    with pytest.raises(UserError, match=r"^distribution: expected a sparsity"):
        layer_densities(SHAPES, 0.2, {"s*": 1.5})
    named = {"fc.weights.0": (8, 8), "fc2.weights.0": (8, 8), "fc2.weights.1": (8, 8)}
    wanted = {"fc.weights.0": 0.2, "fc2.weights.0": 0.5, "fc2.weights.1": 0.5}
    assert layer_densities(named, 0.2, {"fc2": 0.5}) == wanted
    with pytest.raises(UserError, match=r"^distribution: expected uniform, erk or a mapping, got"):
        layer_densities(SHAPES, 0.2, "erkk")  # type: ignore[arg-type]
    for density in (0.0, -0.5, 1.5):
        with pytest.raises(
            UserError, match=rf"^density: expected a number in \(0, 1\], got {density:g}$"
        ):
            layer_densities(SHAPES, density, "uniform")
