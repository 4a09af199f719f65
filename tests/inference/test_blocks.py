"""Feature-major blocks compute what the blocks they come from compute."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from inference.small_models import (
    RULES,
    TILED,
    Family,
    assert_equal,
    dense_model,
    example,
    sparse_model,
)
from padst_exp.inference import pack
from padst_exp.inference.convert import feature_stack, stack_name
from padst_exp.inference.features import (
    DenseFeatureLinear,
    FeatureLinear,
    Fusion,
    TiledFeatureLinear,
)
from padst_exp.inference.linear import PackedLinear
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import sparsify
from padst_kernels import Backend
from structure_cases import STRUCTURES


def tiled(backend: Backend) -> Any:
    def build(name: str, layer: PackedLinear | nn.Linear, fusion: Fusion) -> FeatureLinear:
        if isinstance(layer, PackedLinear):
            return TiledFeatureLinear(layer, backend, fusion)
        return DenseFeatureLinear(layer, fusion)

    return build


def dense(name: str, layer: PackedLinear | nn.Linear, fusion: Fusion) -> FeatureLinear:
    return DenseFeatureLinear(layer, fusion)


def packed(family: Family, structure: str, life: Any = "random") -> Any:
    model = sparse_model(family, structure, life)
    pack(model)
    return model


def converted(model: nn.Module, build: Any) -> Any:
    model = copy.deepcopy(model)
    model.set_submodule(stack_name(model), feature_stack(model, build))
    return model


@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_same_outputs(family: Family) -> None:
    """Of every structure in tiles; in float64, where a mistake cannot hide, and in bfloat16."""
    for structure, life in ((s, p) for s in TILED for p in ("none", "random")):
        model = packed(family, structure, life)
        inputs = example(family, 8 if life == "none" else 1)
        half = model.bfloat16 if life == "random" else None
        model.double()
        exact = inputs.double() if family == "vit" else inputs
        expected = model(exact)
        for build in (tiled("torch"), dense):
            assert_equal(converted(model, build)(exact), expected, (structure, life), 1e-12)
        if half is None:
            continue
        half()
        few = inputs.bfloat16() if family == "vit" else inputs
        found = converted(model, tiled("native"))(few)
        assert found.dtype == torch.bfloat16
        error, usual = (float((y.double() - expected).norm()) for y in (found, model(few)))
        assert error <= 2 * usual, structure


def test_same_outputs_by_triton() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases: list[tuple[Family, str]] = [("vit", "block-8"), ("gpt2", "nm-16")]
    for family, structure in cases:
        model, inputs = packed(family, structure).to(device), example(family, 2).to(device)
        expected = model(inputs)
        assert_equal(converted(model, tiled("triton"))(inputs), expected, structure)


@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_some_layers_may_be_dense(family: Family) -> None:
    """QKV is, as in the papers."""
    model = dense_model(family)
    sparsify(
        model, RULES[family][1:], structure=STRUCTURES["nm-16"], density=0.3,
        learner=RandomPermutation(side="both"),
    )  # fmt: skip
    pack(model)
    inputs = example(family)
    found = converted(model, tiled("native"))(inputs)
    assert_equal(found, model(inputs).detach(), family)


def test_compiles_without_a_break() -> None:
    model = converted(packed("vit", "nm-16"), tiled("native"))
    stack = model.blocks
    del stack.blocks[1]
    x = torch.randn(2, 5, 64)
    expected = stack(x)
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(x), expected, "compiled")


def test_only_tiles_have_a_feature_major_form() -> None:
    for structure in ("unstructured", "block-4"):
        with pytest.raises(ValueError, match="no layer of its blocks has tiles"):
            feature_stack(packed("vit", structure), dense)
    model = packed("vit", "nm-16")
    model.blocks[1].mlp.fc1 = packed("vit", "unstructured").blocks[1].mlp.fc1
    with pytest.raises(ValueError, match=r"mlp\.fc1, a PackedLinear, has no feature-major form"):
        feature_stack(model, dense)
    companion = sparse_model("vit", "nm-16", low_rank=2)
    pack(companion)
    with pytest.raises(ValueError, match="no layer of its blocks has tiles"):
        feature_stack(companion, dense)


def test_what_a_block_must_not_do() -> None:
    changes: list[tuple[str, nn.Module, str]] = [
        ("blocks.0.attn.q_norm", nn.LayerNorm(32), "more than plain attention"),
        ("blocks.0.mlp.act", nn.ReLU(), "mlp.act is ReLU, not GELU"),
        ("blocks.1.norm2", nn.Identity(), "other norms than LayerNorm"),
    ]
    for name, module, message in changes:
        model = packed("vit", "nm-16")
        model.set_submodule(name, module)
        with pytest.raises(ValueError, match=message):
            feature_stack(model, dense)
    with pytest.raises(ValueError, match="it has no stack of blocks"):
        feature_stack(nn.Sequential(nn.Linear(2, 2)), dense)


def test_gpt2_may_have_a_mask_but_no_cache_of_keys() -> None:
    model, inputs = packed("gpt2", "nm-16"), example("gpt2")
    other = converted(model, tiled("native"))
    mask = torch.ones_like(inputs)
    mask[0, :4] = 0
    expected, found = (
        m.transformer(inputs, attention_mask=mask, use_cache=False).last_hidden_state
        for m in (model, other)
    )
    assert_equal(found[mask == 1], expected[mask == 1], "masked")
    with pytest.raises(ValueError, match="use_cache=False"):
        other.transformer(inputs, use_cache=True)
