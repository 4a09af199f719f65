"""Packed and dense models compute what the trained model computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from inference.small_models import (
    TILED,
    Family,
    Life,
    constructor,
    dense_model,
    example,
    sparse_model,
)
from padst_exp.inference import CondensedLinear, PackedLinear, TiledLinear, load, pack
from padst_exp.inference.files import write
from padst_exp.inference.packing import dense_state
from padst_exp.layers import SparseLinear, permutations
from structure_cases import STRUCTURES


def exported(
    folder: Path, model: nn.Module, family: Family, dim: int = 64, heads: int = 2, **changes: Any
) -> Path:
    """Harden, pack and write `model`, as the entry point does."""
    for permutation in permutations(model).values():
        permutation.harden()
    layers = pack(model)
    description = {
        "model": constructor(family, dim, heads),
        "layers": layers,
        "config": "",
        **changes,
    }
    write(folder, model.state_dict(), description, extra={}, overwrite=False)
    return folder


@pytest.mark.parametrize("life", ["none", "random", "hardened", "soft"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_a_loaded_model_computes_what_was_trained(
    family: Family, structure: str, life: Life, tmp_path: Path
) -> None:
    model, _ = sparse_model(family, structure, life)
    inputs = example(family)
    for permutation in permutations(model).values():
        permutation.harden()
    expected = model(inputs)
    loaded = load(exported(tmp_path / "export", model, family))
    kinds = {type(module) for module in loaded.modules() if isinstance(module, PackedLinear)}
    assert kinds == {TiledLinear if structure in TILED else CondensedLinear}
    assert not any(isinstance(module, SparseLinear) for module in loaded.modules())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded(inputs), expected.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("structure", sorted(set(STRUCTURES) - {"diag-stride"}))
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_odd_sizes(family: Family, structure: str, tmp_path: Path) -> None:
    model, _ = sparse_model(family, structure, "random", dim=37, heads=1)
    inputs = example(family)
    expected = model(inputs).detach()
    loaded = load(exported(tmp_path / "export", model, family, 37, 1))
    torch.testing.assert_close(loaded(inputs), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_masked_storage_packs_alike(structure: str) -> None:
    model, _ = sparse_model("vit", structure, "random", storage="masked")
    inputs = example("vit")
    expected = model(inputs).detach()
    pack(model)
    torch.testing.assert_close(model(inputs), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_half_precision_is_as_good_as_that_of_the_dense_model(
    family: Family, structure: str, tmp_path: Path
) -> None:
    model, _ = sparse_model(family, structure, "random")
    inputs = example(family)
    expected = model(inputs).detach()
    folder = exported(tmp_path / "export", model, family)
    half = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    plain = dense_model(family, 64, 2)
    plain.load_state_dict(dense_state(load(folder), plain))
    plain.bfloat16()
    few = inputs.bfloat16() if family == "vit" else inputs
    error, usual = (float((m(few).detach().float() - expected).norm()) for m in (half, plain))
    assert error <= 2 * usual + 1e-3 * float(expected.norm())


@pytest.mark.parametrize("structure", ["nm-16", "unstructured"])
def test_autocast_is_obeyed(structure: str) -> None:
    model, _ = sparse_model("vit", structure, "random")
    inputs = example("vit")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(inputs)
        pack(model)
        found = model(inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), atol=0.05, rtol=0.05)


def test_runs_of_columns_are_still_known_after_loading(tmp_path: Path) -> None:
    runs: list[tuple[Life, int]] = [("none", 8), ("random", 1)]
    for life, run in runs:
        model, _ = sparse_model("vit", "block-8", life)
        loaded = load(exported(tmp_path / life, model, "vit"))
        layers = [module for module in loaded.modules() if isinstance(module, TiledLinear)]
        assert {layer.index().column_run for layer in layers} == {run}


def test_the_head_of_gpt2_stays_tied(tmp_path: Path) -> None:
    model, _ = sparse_model("gpt2", "nm-16")
    folder = exported(tmp_path / "export", model, "gpt2")
    names = load_file(folder / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != ("transformer.wte.weight" in names)
    loaded: Any = load(folder, dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_projections_with_budgets_of_their_own(tmp_path: Path) -> None:
    from inference.small_models import RULES
    from padst_exp.permutations import RandomPermutation
    from padst_exp.sparsify import sparsify

    model = dense_model("vit", 64, 2)
    sparsify(
        model, RULES["vit"], structure=STRUCTURES["nm-16"], density=0.25,
        distribution={"*.qkv.weights.1": 0.5}, learner=RandomPermutation(side="both"),
    )  # fmt: skip
    inputs = example("vit")
    expected = model(inputs).detach()
    folder = exported(tmp_path / "export", model, "vit")
    loaded: Any = load(folder)
    assert len(loaded.blocks[0].attn.qkv.parts) == 3
    torch.testing.assert_close(loaded(inputs), expected, atol=2e-5, rtol=1e-5)
    plain = dense_model("vit", 64, 2)
    plain.load_state_dict(dense_state(loaded, plain))
    torch.testing.assert_close(plain(inputs).detach(), expected, atol=2e-5, rtol=1e-5)


def test_rows_without_entries_take_no_storage() -> None:
    dense = torch.randn(12, 20) * (torch.rand(12, 20) < 0.3)
    dense[[0, 5, 11]] = 0
    layer = CondensedLinear.from_dense(dense, torch.randn(12))
    assert layer.rows.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert layer.weight.numel() == int((dense != 0).sum())
    x = torch.randn(4, 20)
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)
    torch.testing.assert_close(layer.dense()(x), layer(x))


@pytest.mark.parametrize("structure", ["block-8", "nm-16", "unstructured"])
def test_gradients_are_refused(structure: str) -> None:
    model, _ = sparse_model("vit", structure)
    pack(model)
    with pytest.raises(ValueError, match="inference only"):
        model(example("vit").requires_grad_())


def test_soft_permutations_are_refused_before_anything_changes() -> None:
    model, _ = sparse_model("vit", "nm-16", "soft")
    with pytest.raises(ValueError, match=r"^pack: blocks\.0\.attn\.qkv\.\S+ is still soft"):
        pack(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_compiles_without_a_break() -> None:
    for structure in ("block-8", "unstructured"):
        model, _ = sparse_model("vit", structure, "random")
        pack(model)
        inputs = example("vit")
        expected = model(inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("life", ["none", "hardened"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_plain_timm_loads_the_dense_form(structure: str, life: Life) -> None:
    from timm.models import VisionTransformer

    model, _ = sparse_model("vit", structure, life)
    inputs = example("vit")
    expected = model(inputs).detach()
    pack(model)
    state = dense_state(model, dense_model("vit", 64, 2))
    plain = VisionTransformer(
        img_size=12, patch_size=4, in_chans=1, num_classes=5, embed_dim=64, depth=2, num_heads=2,
        mlp_ratio=1.5, init_values=0.3,
    )  # fmt: skip
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(plain.eval()(inputs).detach(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("life", ["none", "hardened"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_plain_transformers_loads_the_dense_form(structure: str, life: Life) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model, _ = sparse_model("gpt2", structure, life)
    inputs = example("gpt2")
    expected = model(inputs).detach()
    pack(model)
    state = dense_state(model, dense_model("gpt2", 64, 2))
    plain = GPT2LMHeadModel(
        GPT2Config(vocab_size=13, n_positions=9, n_embd=64, n_layer=2, n_head=2)
    )
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(plain.eval()(inputs).logits.detach(), expected, atol=2e-5, rtol=1e-5)
