import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from padst_exp.errors import UserError
from padst_exp.layers import SparseLinear, layer_densities, sparse_weights
from padst_exp.permutations import DoublyStochastic, RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import NM, Block, Dense, Unstructured


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


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def test_full_density_computes_what_the_dense_model_did() -> None:
    tokens = torch.randint(0, 11, (2, 5))
    expected = toy()(tokens)
    model = toy()
    sparsify(model, RULES, structure=Unstructured(), density=1.0)
    torch.testing.assert_close(model(tokens), expected)


def test_report_counts_exactly() -> None:
    model = toy()
    report = sparsify(model, RULES, structure=Block(size=4, balanced=False), density=0.25)
    names = [layer.name for layer in report.layers]
    assert names == ["qkv.weights.0", "qkv.weights.1", "qkv.weights.2", "fc1.weights.0",
                     "fc2.weights.0"]  # fmt: skip
    assert all(isinstance(getattr(model, name), SparseLinear) for name in ("qkv", "fc1", "fc2"))
    for layer, weight in zip(report.layers, sparse_weights(model).values(), strict=True):
        assert layer.parameters == int((weight.dense() != 0).sum()) == weight.values.numel()
        assert layer.density == layer.parameters / (layer.shape[0] * layer.shape[1]) == 0.25
        assert layer.macs_dense == layer.shape[0] * layer.shape[1]
    assert report.density("layers") == 0.25
    total = sum(p.numel() for p in toy().parameters())
    removed = 0.75 * (96 * 32 + 2 * 64 * 32)
    assert report.density("model") == pytest.approx(1 - removed / total)


def test_rows_are_scaled_to_their_own_fan_in() -> None:
    layer = nn.Sequential(nn.Linear(400, 300, bias=False))
    expected = float(layer[0].weight.detach().norm(dim=1).mean())
    sparsify(layer, [Rule("0")], structure=Unstructured(), density=0.1)
    norms = sparse_weights(layer)["0.weights.0"].dense().norm(dim=1)
    # Rows have different fan-ins here, yet about the same norm as the dense ones.
    assert float(norms.mean()) == pytest.approx(expected, rel=0.05)
    assert float(norms.std()) < 0.2 * expected


def test_magnitude_topology_keeps_the_largest_units() -> None:
    layer = nn.Sequential(nn.Linear(16, 16))
    dense = layer[0].weight.detach().clone()
    sparsify(layer, [Rule("0")], structure=Unstructured(), density=0.25, topology="magnitude",
             rescale=False)  # fmt: skip
    kept = sparse_weights(layer)["0.weights.0"].dense()
    smallest_kept = kept[kept != 0].abs().min()
    assert bool((dense[kept == 0].abs() <= smallest_kept).all())
    assert torch.equal(kept[kept != 0], dense[kept != 0])


def test_seed_decides_topology_and_zero_is_a_seed() -> None:
    models = [toy() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        sparsify(model, RULES, structure=Unstructured(), density=0.25, seed=seed)
    first, same, other = (sparse_weights(model)["fc1.weights.0"].active for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_fused_projections_share_one_input_permutation() -> None:
    model = toy()
    sparsify(model, RULES, structure=NM(n=1, m=None, group=8), density=0.25,
             learner=DoublyStochastic(side="auto"))  # fmt: skip
    qkv = model.qkv
    assert isinstance(qkv, SparseLinear)
    assert qkv.input_permutation is not None and qkv.input_permutation.size == 32
    assert all(isinstance(output, nn.Identity) for output in qkv.output_permutations)


def test_auto_permutes_the_shorter_side() -> None:
    model = toy()
    report = sparsify(model, RULES, structure=Unstructured(), density=0.25,
                      learner=RandomPermutation(side="auto"))  # fmt: skip
    sides = {layer.name: layer.side for layer in report.layers}
    assert sides["fc1.weights.0"] == "in" and sides["fc2.weights.0"] == "out"


def test_auto_permutes_the_rows_of_a_square_weight_whose_rows_share_inputs() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    report = sparsify(model, [Rule("0")], structure=NM(n=1, m=None, group=8), density=0.25,
                      learner=RandomPermutation(side="auto"))  # fmt: skip
    assert report.layers[0].side == "out"


def test_dense_structure_leaves_the_model_alone() -> None:
    model = toy()
    report = sparsify(model, RULES, structure=Dense(), density=0.1)
    assert not sparse_weights(model) and report.density("layers") == report.density("model") == 1


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("blocks.*")], "matches no layer"),
        ([Rule("norm")], "only linear layers"),
        ([Rule("head")], "tied"),
        ([Rule("embedding")], "only linear layers"),
        ([Rule("fc1", split=5)], "does not divide"),
    ],
)
def test_bad_rules_are_one_line(rules: list[Rule], message: str) -> None:
    with pytest.raises(UserError, match=rf"^sparse: pattern [^\n]*{message}[^\n]*$"):
        sparsify(toy(), rules, structure=Unstructured(), density=0.5)


def test_an_impossible_sparsity_names_the_layer() -> None:
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


def test_explicit_distribution_overrides_by_pattern() -> None:
    assert layer_densities(SHAPES, 0.2, {"s*": 0.5}) == {"wide": 0.2, "tall": 0.2, "small": 0.5}
    with pytest.raises(UserError, match=r"^distribution: pattern 'x\*' matches no"):
        layer_densities(SHAPES, 0.2, {"x*": 0.5})
    with pytest.raises(UserError, match=r"^distribution: expected a sparsity"):
        layer_densities(SHAPES, 0.2, {"s*": 1.5})


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5])
def test_density_outside_its_range(density: float) -> None:
    with pytest.raises(UserError, match=r"^sparsity: expected a number in \[0, 1\)"):
        layer_densities(SHAPES, density, "uniform")
