"""Transforms keep the FLOPs of the dense model, have the paper's sizes, compute what they say."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from from_yaml import from_yaml, leaf
from padst_exp.analysis.cost import count, sparse_ift_flops
from padst_exp.config import build, config_dir
from padst_exp.errors import UserError
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import NM, Dense, Unstructured
from padst_exp.transforms import (
    NoTransform,
    Original,
    SparseDoped,
    SparseFactorized,
    SparseParallel,
    SparseWide,
    Transform,
    Transformed,
    example,
    rebuild,
    widened,
)
from padst_exp.transforms.transform import whole

IMAGES = {"image_size": 8, "channels": 3, "num_classes": 10}
TEXT = {"vocab_size": 60, "context_length": 16}
SIZES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "resnet18": ({"width": 0.25, "stem": "cifar"}, IMAGES),
    "mobilenet_v2": ({"width": 0.5, "stem": "cifar"}, IMAGES),
    "vit": ({"patch_size": 4, "dim": 64, "depth": 2, "heads": 4}, IMAGES),
    "gpt2": ({"dim": 64, "depth": 2, "heads": 4}, TEXT),
}
TRANSFORMS = ["sparse_wide", "sparse_parallel", "sparse_factorized", "sparse_doped"]


def original(
    model: str, changes: Mapping[str, Any], shape: dict[str, int], device: str = "cpu"
) -> Original:
    node = leaf(f"model/{model}", **changes)
    rules = OmegaConf.load(config_dir() / "model" / f"{model}.yaml").sparse

    def dense(more: Mapping[str, object]) -> nn.Module:
        torch.manual_seed(0)
        with torch.device(device):
            return build(OmegaConf.create({**node, **more}), "model", shape)

    return Original(
        build=dense,
        keys={str(key): value for key, value in node.items() if key != "_target_"},
        rules=[Rule(rule.pattern, rule.split) for rule in rules],
        inputs=example(shape).to(device),
    )


def small(model: str) -> Original:
    changes, shape = SIZES[model]
    return original(model, changes, shape)


def sparse(transformed: Transformed, **changes: Any) -> Any:
    return sparsify(
        transformed.model,
        transformed.rules,
        **{"structure": Unstructured(), "density": transformed.density, **changes},
        baseline=transformed.baseline,
    )


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, "resnet18") for name in TRANSFORMS),
        ("sparse_wide", "gpt2"),
        ("sparse_factorized", "gpt2"),
        ("sparse_wide", "vit"),
        ("sparse_doped", "vit"),
        ("sparse_parallel", "mobilenet_v2"),
    ],
)
def test_flops_of_the_sparse_model_are_those_of_the_dense_one(name: str, model: str) -> None:
    start = small(model)
    transform: Transform = from_yaml(f"transform/{name}")
    transformed = transform(start, 0.75, "erk" if model == "vit" else "uniform")
    report = sparse(transformed, distribution="erk" if model == "vit" else "uniform")
    transform.check(report)

    dense = start.build({})
    before = count(dense, start.inputs).flops
    now = count(transformed.model, start.inputs).flops
    assert now == pytest.approx(before, rel=0.01)
    assert report.flops() == pytest.approx(now / before, abs=1e-6)
    kept = sum(parameter.numel() for parameter in transformed.model.parameters())
    assert report.density("model") == pytest.approx(
        kept / sum(parameter.numel() for parameter in dense.parameters()), abs=1e-9
    )

    inputs = start.inputs if model == "gpt2" else torch.randn(2, *start.inputs.shape[1:])
    logits = transformed.model.train()(inputs)
    assert logits.shape == dense(inputs).shape
    logits.square().mean().backward()
    assert all(p.grad is not None for p in transformed.model.parameters())
    assert 0.02 < float(logits.detach().std()) < 20


def test_sizes_are_the_papers() -> None:
    """Of a 3x3 convolution of 64 channels. (Theirs rounds 576.0000001 to a rank of 577.)"""
    start = original("resnet18", {"stem": "cifar"}, {**IMAGES, "num_classes": 100}, "meta")
    name = "layer1.0.conv1"
    keys: Any = {"scope": "layers", "nonlinearity": "paper", "keep": ["*.downsample.*"]}
    for sparsity, branches, factorized, doped, wide in (
        (0.5, 2, 116, 28, 90),
        (0.75, 4, 231, 43, 128),
        (0.9, 10, 576, 51, 202),
    ):
        model: Any = SparseFactorized(**keys)(start, sparsity, "uniform").model
        assert model.get_submodule(f"{name}.up").in_channels == factorized
        model = SparseDoped(**keys)(start, sparsity, "uniform").model
        assert model.get_submodule(f"{name}.down").out_channels == doped
        assert isinstance(model.get_submodule("layer2.0.downsample.0"), nn.Conv2d)
        model = SparseWide(scope="layers")(start, sparsity, "uniform").model
        stages = [model.get_submodule(f"layer{i}.0.conv1").out_channels for i in (1, 4)]
        assert stages == [wide, 8 * wide]
        assert whole(1 / (1 - sparsity), "branches", sparsity) == branches


def test_wide_gpt3_is_cerebras_own_and_not_iso_flop_as_asked() -> None:
    start = original("gpt3_small", {}, {"vocab_size": 50257, "context_length": 1024}, "meta")
    for sparsity, width, ratio in ((0.5, 1092, 1.18), (0.75, 1536, 1.40)):
        assert widened(start.keys, math.sqrt(1 / (1 - sparsity))) == {"dim": width}
        baseline = SparseWide(scope="layers")(start, sparsity, "uniform").baseline
        assert baseline is not None
        flops = baseline.flops
        assert flops is not None
        now = flops.now(dict.fromkeys(flops.weights, 1 - sparsity))
        assert now / flops.dense == pytest.approx(ratio, abs=0.015)
        # Products and attention of the dense model, in millions a token.
        assert flops.dense / 2e6 / 1024 == pytest.approx(142.4, rel=0.02)


@pytest.mark.parametrize(
    ("stem", "shape", "solved"),
    [
        ("cifar", {"image_size": 32, "channels": 3, "num_classes": 100}, (0.4960, 0.7514, 0.9011)),
        (
            "imagenet",
            {"image_size": 224, "channels": 3, "num_classes": 1000},
            (0.5097, 0.7690, 0.9160),
        ),
    ],
)
def test_sparsities_of_wide_resnet_are_those_that_the_authors_solve_for(
    stem: str, shape: dict[str, int], solved: tuple[float, ...]
) -> None:
    start = original("resnet18", {"stem": stem}, shape, "meta")
    skip = ("*act*", "global_pool*") if stem == "cifar" else ("*act*",)
    budget = sparse_ift_flops(start.build({}), start.inputs, skip=skip)
    for sparsity, expected in zip((0.5, 0.75, 0.9), solved, strict=True):
        transformed = SparseWide(scope="model")(start, sparsity, "uniform")
        # They stop within 0.1% of the budget.
        assert 1 - transformed.density == pytest.approx(expected, abs=1.5e-3)
        assert transformed.baseline is not None
        assert transformed.baseline.flops is not None
        layers = {name.rpartition(".weights")[0] for name in transformed.baseline.flops.weights}
        theirs = dict.fromkeys(layers, 1 - expected)
        flops = sparse_ift_flops(transformed.model, start.inputs, theirs, skip=skip)
        assert flops == pytest.approx(budget, rel=2e-3)


def perceptron(act: Callable[[], nn.Module] = nn.ReLU) -> Original:
    def dense(_: object) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 24), act(), nn.Linear(24, 8))

    return Original(build=dense, keys={}, rules=[Rule("0"), Rule("2")], inputs=torch.zeros(1, 12))


def test_parallel_branches_have_the_activation_inside_or_add_up_to_one_layer() -> None:
    x = torch.randn(5, 12)
    keys: Any = {"scope": "layers", "keep": []}
    inside = SparseParallel(nonlinearity="paper", **keys)(perceptron(nn.GELU), 0.5, "uniform").model
    gelu = nn.functional.gelu
    hidden = sum(gelu(inside.get_submodule(f"0.branches.{i}.layer")(x)) for i in range(2))
    expected = sum(gelu(inside.get_submodule(f"2.branches.{i}.layer")(hidden)) for i in range(2))
    torch.testing.assert_close(inside(x), expected)

    after = SparseParallel(nonlinearity="code", **keys)(perceptron(nn.GELU), 0.5, "uniform").model
    branches = [after.get_submodule(f"0.branches.{i}.layer") for i in range(2)]
    folded = gelu(
        nn.functional.linear(x, sum(b.weight for b in branches), sum(b.bias for b in branches))
    )
    torch.testing.assert_close(after[1](after[0](x)), folded)


def test_more_branches_than_a_model_can_have_are_refused_before_they_are_made() -> None:
    message = r"^sparsity: expected at most 0\.999, which is 1000 branches, got 0\.99999 \("
    with pytest.raises(UserError, match=message):
        SparseParallel(scope="layers", keep=[], nonlinearity="paper")(
            perceptron(nn.GELU), 0.99999, "uniform"
        )


def test_parallel_branches_of_a_convolution_have_a_norm_each() -> None:
    start = small("resnet18")
    model = SparseParallel(scope="layers", nonlinearity="paper", keep=[])(
        start, 0.5, "uniform"
    ).model
    for name in ("layer1.0.conv2", "layer2.0.conv1"):
        for branch in model.get_submodule(f"{name}.branches").children():
            assert [type(part) for part in branch] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert isinstance(model.get_submodule("layer1.0.bn2"), nn.Identity)
    assert isinstance(model.get_submodule("layer1.0.act2"), nn.ReLU), "it reads the shortcut too"


def test_factors() -> None:
    x = torch.randn(5, 12)
    keys: Any = {"scope": "layers", "keep": ["2"]}
    for nonlinearity, act in (("paper", nn.ReLU()), ("code", nn.Identity())):
        model: Any = SparseFactorized(nonlinearity=nonlinearity, **keys)(
            perceptron(), 0.5, "uniform"
        ).model
        assert model[0].down.out_features == math.ceil(12 * 24 / 36 / 0.5)
        torch.testing.assert_close(model[0](x), model[0].up(act(model[0].down(x))))
        assert isinstance(model[1], nn.ReLU)
        assert isinstance(model[2], nn.Linear)


def test_doped_factors_stay_dense_and_linear() -> None:
    x = torch.randn(5, 12)
    keys: Any = {"scope": "layers", "keep": []}
    start = perceptron()
    transformed = SparseDoped(nonlinearity="paper", **keys)(start, 0.5, "uniform")
    assert [rule.pattern for rule in transformed.rules] == ["0.sparse.layer", "2.sparse.layer"]
    report = sparse(transformed)
    doped: Any = transformed.model[0]
    assert type(doped.down) is type(doped.up) is nn.Linear
    low_rank = x @ (doped.up.weight @ doped.down.weight).t()
    torch.testing.assert_close(doped(x), doped.sparse.layer(x).relu() + low_rank)
    assert isinstance(transformed.model[1], nn.Identity)
    assert report.density("layers") == pytest.approx(1, abs=0.05), "zeros pay for the factors"

    after: Any = SparseDoped(nonlinearity="code", **keys)(start, 0.5, "uniform").model
    assert isinstance(after[1], nn.ReLU)
    assert type(after[0].sparse) is nn.Sequential
    assert len(after[0].sparse) == 1


def test_no_sparsity_changes_no_layer() -> None:
    start = small("vit")
    for name in TRANSFORMS:
        transformed = from_yaml(f"transform/{name}")(start, 0.0, "uniform")
        assert transformed.density == 1
        assert repr(transformed.model) == repr(start.build({}))
    assert NoTransform()(start, 0.9, "uniform").density == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["sparse_wide", "sparse_parallel", "sparse_doped"])
def test_a_model_can_be_made_again_from_plain_data(name: str) -> None:
    changes, shape = SIZES["vit"]
    start, node = small("vit"), leaf("model/vit", **changes)
    transform = leaf(f"transform/{name}")
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    calls: dict[str, Any] = {
        "model": {"_target_": node._target_, "arguments": {**arguments, **shape}},
        "transform": {
            "_target_": transform._target_,
            "arguments": {key: v for key, v in transform.items() if key != "_target_"},
        },
        "rules": [{"pattern": rule.pattern, "split": rule.split} for rule in start.rules],
        "sparsity": 0.5,
        "shape": shape,
    }
    with torch.device("meta"):
        again = rebuild(**calls)
    made = from_yaml(f"transform/{name}")(start, 0.5, "uniform").model
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in made.state_dict().items()
    }
    calls["model"]["_target_"] = "os.system"
    with pytest.raises(ValueError, match=r"'os\.system' is none of padst_exp\.models\."):
        rebuild(**calls)


@pytest.mark.parametrize(
    ("name", "model", "changes", "sparsity", "message"),
    [
        ("sparse_parallel", "vit", {}, 0.6, r"sparsity: .* such as 0\.5 or 0\.6667, got 0\.6 \("),
        ("sparse_wide", "gpt2", {"vocab_size": 4000}, 0.9, r"sparsity: expected less .* got 0\.9"),
        ("sparse_doped", "resnet18", {}, 0.001, r"sparsity: .* rank 1, got 0\.001 \(layer layer1"),
        ("sparse_wide", "vit", {"pretrained": True}, 0.5, "transform: expected none with weights"),
    ],
)
def test_what_cannot_be_is_one_line(
    name: str, model: str, changes: dict[str, Any], sparsity: float, message: str
) -> None:
    sizes, shape = SIZES[model]
    shape = {key: changes.pop(key, value) for key, value in shape.items()}
    start = original(model, sizes, shape)
    start = Original(start.build, {**start.keys, **changes}, start.rules, start.inputs)
    with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
        from_yaml(f"transform/{name}")(start, sparsity, "uniform")


def test_structures_that_cannot_pay_are_refused() -> None:
    start = perceptron()
    transform = SparseParallel(scope="model", nonlinearity="code", keep=[])
    transformed = transform(start, 0.75, "uniform")
    with pytest.raises(UserError, match=r"^transform: expected none with structure=dense, got Sp"):
        transform.check(sparse(transformed, structure=Dense()))
    transformed = transform(start, 0.75, "uniform")
    coarse = NM(n=1, m=None, group=8)
    with pytest.raises(UserError, match=r"^transform: expected a structure whose units .*layers$"):
        transform.check(sparse(transformed, structure=coarse))
    with pytest.raises(UserError, match=r"^transform: expected another one, SparseWide needs"):
        SparseWide(scope="model")(start, 0.5, "uniform")
