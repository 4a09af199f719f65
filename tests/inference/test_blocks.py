"""Feature-major blocks compute what the blocks they come from compute."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from inference.small_models import RULES, TILED, Family, dense_model, example, sparse_model
from padst_exp.inference import pack
from padst_exp.inference.convert import feature_stack, stack_name
from padst_exp.inference.features import (
    Around,
    DenseFeatureLinear,
    FeatureLinear,
    TiledFeatureLinear,
)
from padst_exp.inference.linear import PackedLinear, TiledLinear
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import sparsify
from padst_kernels import Backend
from structure_cases import STRUCTURES


def tiled(backend: Backend) -> Any:
    def build(name: str, layer: PackedLinear | nn.Linear, around: Around) -> FeatureLinear:
        if isinstance(layer, TiledLinear):
            return TiledFeatureLinear(layer, backend, around)
        return DenseFeatureLinear(layer, around)

    return build


def dense(name: str, layer: PackedLinear | nn.Linear, around: Around) -> FeatureLinear:
    return DenseFeatureLinear(layer, around)


def converted(model: nn.Module, build: Any) -> nn.Module:
    model = copy.deepcopy(model)
    model.set_submodule(stack_name(model), feature_stack(model, build))
    return model


@pytest.mark.parametrize("life", ["none", "random"])
@pytest.mark.parametrize("structure", TILED)
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_same_outputs(family: Family, structure: str, life: Any) -> None:
    model, _ = sparse_model(family, structure, life)
    pack(model)
    model.double()
    for batch in (1, 8):
        inputs = example(family, batch)
        inputs = inputs.double() if family == "vit" else inputs
        expected = model(inputs)
        for build in (tiled("torch"), dense):
            found = converted(model, build)(inputs)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("structure", TILED)
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_same_outputs_in_single_and_half_precision(family: Family, structure: str) -> None:
    model, _ = sparse_model(family, structure, "random")
    pack(model)
    inputs = example(family)
    expected = model(inputs)
    torch.testing.assert_close(
        converted(model, tiled("torch"))(inputs), expected, atol=5e-5, rtol=1e-4
    )
    model.bfloat16()
    few = inputs.bfloat16() if family == "vit" else inputs
    found = converted(model, tiled("torch"))(few)
    assert found.dtype == torch.bfloat16
    error, usual = (float((y.float() - expected).norm()) for y in (found, model(few)))
    assert error <= 2 * usual


@pytest.mark.parametrize("structure", ["block-8", "nm-16"])
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_same_outputs_by_triton(family: Family, structure: str) -> None:
    model, _ = sparse_model(family, structure, "random")
    pack(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    inputs = example(family, 2).to(device)
    expected = model(inputs)
    found = converted(model, tiled("triton"))(inputs)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_some_layers_may_be_dense(family: Family) -> None:
    """QKV is, as in the papers."""
    model = dense_model(family, 64, 2)
    sparsify(
        model, RULES[family][1:], structure=STRUCTURES["nm-16"], density=0.3,
        learner=RandomPermutation(side="both"),
    )  # fmt: skip
    pack(model)
    inputs = example(family)
    found = converted(model, tiled("torch"))(inputs)
    torch.testing.assert_close(found, model(inputs).detach(), atol=5e-5, rtol=1e-4)


def test_compiles_without_a_break() -> None:
    for family in ("vit", "gpt2"):
        model, _ = sparse_model(family, "nm-16", "random")
        pack(model)
        model = converted(model, tiled("torch"))
        inputs = example(family)
        expected = model(inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("structure", "message"),
    [("unstructured", "no layer of its blocks has tiles"), ("block-4", "no layer of its blocks")],
)
def test_single_entries_have_no_feature_major_form(structure: str, message: str) -> None:
    model, _ = sparse_model("vit", structure)
    pack(model)
    with pytest.raises(ValueError, match=message):
        feature_stack(model, dense)


def test_what_a_block_must_not_do() -> None:
    changes: list[tuple[str, nn.Module, str]] = [
        ("blocks.0.attn.q_norm", nn.LayerNorm(32), "more than plain attention"),
        ("blocks.0.mlp.act", nn.ReLU(), "mlp.act is ReLU, not GELU"),
        ("blocks.1.norm2", nn.Identity(), "other norms than LayerNorm"),
    ]
    for name, module, message in changes:
        model, _ = sparse_model("vit", "nm-16")
        pack(model)
        model.set_submodule(name, module)
        with pytest.raises(ValueError, match=message):
            feature_stack(model, dense)
    with pytest.raises(ValueError, match="it has no stack of blocks"):
        feature_stack(nn.Sequential(nn.Linear(2, 2)), dense)


def test_a_cache_of_keys_is_refused() -> None:
    model: Any
    model, _ = sparse_model("gpt2", "nm-16")
    pack(model)
    model = converted(model, tiled("torch"))
    with pytest.raises(ValueError, match="use_cache=False"):
        model.transformer(example("gpt2"), use_cache=True)


def test_a_mask_of_gpt2_is_obeyed() -> None:
    model: Any
    model, _ = sparse_model("gpt2", "nm-16")
    pack(model)
    inputs = example("gpt2")
    mask = torch.ones_like(inputs)
    mask[0, :4] = 0
    other: Any = converted(model, tiled("torch"))
    expected, found = (
        m.transformer(inputs, attention_mask=mask, use_cache=False).last_hidden_state
        for m in (model, other)
    )
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], atol=5e-5, rtol=1e-4)
