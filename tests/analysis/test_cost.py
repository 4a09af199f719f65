"""Costs are counted exactly: by hand, under Sparse-IFT's convention, dense and sparse alike."""

from typing import Any

import pytest
import torch
from torch import nn

from from_yaml import leaf
from padst_exp.analysis.cost import count, sparse_ift_flops
from padst_exp.config import build
from padst_exp.permutations import Permutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Unstructured


def model(name: str, shape: dict[str, object], /, device: str = "cpu", **changes: Any) -> nn.Module:
    with torch.device(device):
        return build(leaf(f"model/{name}", **changes), "model", shape)


def test_budgets_are_those_of_sparse_ift() -> None:
    images = {"image_size": 224, "channels": 3, "num_classes": 1000}
    cifar = {"image_size": 32, "channels": 3, "num_classes": 100}
    for name, shape, stem, skip, flops in (
        ("resnet18", cifar, "cifar", ("*act*", "global_pool*"), 1_115_226_800),
        ("resnet18", images, "imagenet", ("*act*",), 3_647_128_359),
        ("resnet34", images, "imagenet", ("*act*",), 7_355_270_501),
    ):
        dense = model(name, shape, "meta", stem=stem)
        size = shape["image_size"]
        assert isinstance(size, int)
        inputs = torch.zeros(1, 3, size, size, device="meta")
        assert sparse_ift_flops(dense, inputs, skip=skip) == flops
        ours = count(dense, inputs).flops
        assert ours == pytest.approx(flops, rel=0.005), "the conventions differ in norms alone"
        assert dense.training


def test_a_layer_by_hand() -> None:
    layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 5, bias=False))
    costs = count(layers, torch.zeros(2, 3, 4))
    assert costs.products() == {"0": 2 * 6 * 4 * 6, "3": 2 * 6 * 6 * 5}
    kinds = {kind: flops for kind, (flops, _) in costs.by_kind().items()}
    assert kinds == {"product": 648, "norm": 7 * 36, "activation": 8 * 36, "other": 36}
    assert costs.flops == sum(kinds.values())
    # Input, weight, bias and output of the first layer, in bytes.
    assert next(r.bytes for r in costs.rows if r.module == "0") == 4 * (24 + 24 + 6 + 36)


def test_attention_counts_its_two_products_and_its_softmax() -> None:
    text = {"vocab_size": 11, "context_length": 8}
    sizes = {"dim": 16, "depth": 3, "heads": 2}
    for name, more in (("gpt2", {}), ("llama_60m", {"mlp_dim": 24})):
        costs = count(model(name, text, **sizes, **more), torch.zeros(1, 8, dtype=torch.int64))
        expected = 3 * (2 * 2 * 8 * 8 * 16 + 5 * 2 * 8 * 8)
        attention = costs.by_kind()["attention"][0]
        assert expected <= attention < 1.02 * expected, "LLaMA's angles are a small product"
        assert costs.products()["lm_head"] == 2 * 8 * 16 * 11


def test_sparse_layers_cost_their_entries_their_companion_and_what_is_soft() -> None:
    images: dict[str, object] = {"image_size": 16, "channels": 3, "num_classes": 10}
    for name, sizes, patterns in (
        ("vit", {"patch_size": 4, "dim": 32, "depth": 1, "heads": 2}, ["blocks.*.mlp.fc?"]),
        ("resnet18", {"width": 0.25, "stem": "cifar"}, ["layer1.*.conv?", "layer2.0.conv1"]),
    ):
        sparse = model(name, images, **sizes)
        inputs = torch.zeros(1, 3, 16, 16)
        dense = count(sparse, inputs)
        rules = [Rule(pattern) for pattern in patterns]
        report = sparsify(sparse, rules, structure=Unstructured(), density=0.3, low_rank=2, seed=1)
        costs = count(sparse, inputs)
        saved = 0.0
        for layer in report.layers:
            module = layer.name.rpartition(".weights")[0]
            now, before = costs.products()[module], dense.products()[module]
            assert now == pytest.approx(before * layer.parameters / layer.macs_dense)
            saved += before - now
        assert costs.flops == pytest.approx(dense.flops - saved)
        expected = sparse(inputs)

        module, layer = next(iter(report.model_layers.items()))
        size = layer.in_features // layer.taps
        positions = (
            costs.products()[module]
            / 2
            / sum(row.parameters for row in report.layers if row.name.startswith(f"{module}."))
        )
        layer.input_permutation = Permutation(torch.eye(size))
        soft = count(sparse, inputs).products()[module] - costs.products()[module]
        assert soft == 2 * positions * layer.taps * size**2
        layer.input_permutation = None
        assert torch.equal(sparse(inputs), expected), "counting leaves no trace"
