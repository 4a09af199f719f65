"""Packed and dense models compute what the trained model computes."""

import copy
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import distributed, nn
from transformers import GPT2Config, GPT2LMHeadModel

from inference.small_models import (
    RULES,
    TILED,
    Family,
    Life,
    assert_equal,
    constructor,
    dense_model,
    example,
    exported,
    sparse_model,
)
from padst_exp.dst import Change, Selection
from padst_exp.inference import PackedConv2d, PackedEntries, PackedLinear, load, pack
from padst_exp.inference.packing import dense_state, harden
from padst_exp.layers import SparseLinear, SparseWeight, sparse_layers, sparse_weights
from padst_exp.layers.views import replace_module
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_kernels.entries import condense
from permutation_cases import learned
from structure_cases import STRUCTURES

LIVES: list[Life] = ["none", "random", "hardened", "soft"]
CONVOLVED = [name for name in STRUCTURES if name != "diag-stride"]
FAMILIES: list[Family] = ["vit", "gpt2"]


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def plain_timm() -> nn.Module:
    return VisionTransformer(
        img_size=12, patch_size=4, in_chans=1, num_classes=5, embed_dim=64, depth=2, num_heads=2,
        mlp_ratio=1.5, init_values=0.3,
    )  # fmt: skip


def plain_transformers() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=9, n_embd=64, n_layer=2, n_head=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_computes_what_was_trained(family: Family, tmp_path: Path) -> None:
    """Every structure, permutations in every phase of their life, packed and dense, odd sizes."""
    lives = islice(cycle(LIVES), FAMILIES.index(family) * 2, None)
    cases = [(structure, life, 64) for structure, life in zip(2 * [*STRUCTURES], lives)]  # noqa: B905
    cases += [(structure, "random", 37) for structure in STRUCTURES if structure != "diag-stride"]
    for number, (structure, life, dim) in enumerate(cases):
        case, heads = (structure, life, dim), 2 if dim == 64 else 1
        storage: Any = "masked" if number % 3 == 2 else "packed"
        model = sparse_model(family, structure, life, dim=dim, heads=heads, storage=storage)
        inputs = example(family)
        harden(model)
        expected = model(inputs).detach()
        folder = exported(tmp_path / str(number), model, constructor(family, dim, heads))
        loaded: Any = load(folder)
        assert {layer.tiles is not None for layer in packed_layers(loaded)} == {structure in TILED}
        assert not sparse_layers(loaded) and not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert_equal(loaded(inputs), expected, case)
        if dim == 64:
            plain = plain_timm() if family == "vit" else plain_transformers()
            plain.load_state_dict(dense_state(loaded, dense_model(family)), strict=True)
            found = plain.eval()(inputs)
            assert_equal(found if family == "vit" else found.logits, expected, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_good_as_that_of_the_dense_model(
    family: Family, tmp_path: Path
) -> None:
    for structure in [*STRUCTURES][FAMILIES.index(family) :: 2]:
        model, inputs = sparse_model(family, structure, "random"), example(family)
        expected = model(inputs).detach()
        folder = exported(tmp_path / structure, model, constructor(family))
        half = load(folder, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        plain = dense_model(family)
        plain.load_state_dict(dense_state(load(folder), plain))
        plain.bfloat16()
        few = inputs.bfloat16() if family == "vit" else inputs
        error, usual = (float((m(few).detach().float() - expected).norm()) for m in (half, plain))
        assert error <= 2 * usual + 1e-3 * float(expected.norm()), structure


def changed(weight: SparseWeight, generator: torch.Generator) -> Change:
    """Other units, unevenly spread over the pools and fewer or more in all; rows in any order."""
    geometry = weight.geometry
    share = torch.rand(geometry.num_pools, 1, generator=generator) ** 3
    share[0] = 0
    scores = torch.rand(geometry.num_pools, geometry.pool_size, generator=generator)
    exists = torch.arange(geometry.pool_size) < geometry.candidates[:, None]
    chosen = (scores < share) & exists
    # One unit at least, all of the first pool's where it is the only one.
    chosen[-1, 0] = True
    order = torch.randperm(weight.shape[0], generator=generator)
    reorder = bool(torch.rand((), generator=generator) < 0.5)
    active = chosen.flatten().nonzero().squeeze(1)
    return Change(active, row_order=order if reorder else None)


def test_whatever_an_algorithm_made_of_a_topology_packs_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    empty = 0
    for structure, side, draw in ((s, p, d) for s in STRUCTURES for p in ("none", "both")
                                  for d in range(4)):  # fmt: skip
        size = 64 if structure == "diag-stride" else 61
        model = nn.Sequential(nn.Linear(64, 3 * size), nn.Linear(3 * size, 64, bias=False))
        sparsify(
            model, [Rule("0", split=3), Rule("1")], structure=STRUCTURES[structure], density=0.25,
            learner=RandomPermutation(side="both") if side == "both" else None,
        )  # fmt: skip
        for weight in sparse_weights(model).values():
            weight.adopt(changed(weight, generator))
            inside = weight.entries() < weight.shape[0] * weight.shape[1]
            weight.values.data.copy_(torch.randn(weight.values.shape) * inside)
        x = torch.randn(5, 64)
        dense = model[1].weight @ (model[0].weight @ x.t() + model[0].bias[:, None])
        pack(model)
        case = structure, side, draw
        assert_equal(model(x), dense.t().detach(), case)
        for layer in packed_layers(model):
            layer.backend = "native"
            assert_equal(layer.weight, layer.dense().weight, case)
            for part in layer.weights():
                empty += int((part.matrix() == 0).all(1).sum())
        assert_equal(model(x), dense.t().detach(), case)
    assert empty > 100  # rows that nothing reaches were among them


def test_rows_without_entries_take_no_storage() -> None:
    dense = torch.randn(12, 20) * (torch.rand(12, 20) < 0.3)
    dense[[0, 5, 11]] = 0
    entries = dense.flatten().nonzero().squeeze(1)
    weight = PackedEntries(condense(dense.flatten()[entries], entries, 12, 20))
    assert weight.rows.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert weight.values.numel() == int((dense != 0).sum())
    layer = PackedLinear([weight], torch.randn(12), None)
    x = torch.randn(4, 20)
    assert_equal(layer(x), x @ dense.T + layer.bias, "packed")
    assert_equal(layer.dense()(x), layer(x), "dense")


def test_biases_of_silent_rows_are_exported_as_the_zeros_they_are() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    sparsify(model, [Rule("0")], structure=STRUCTURES["fan-in-1"], density=0.25)
    (weight,) = sparse_weights(model).values()
    weight.adopt(Change(weight.active.long()[8:]))
    model[0].silences_rows = True
    model[0].index()
    x = torch.randn(3, 16)
    expected = model(x).detach()
    assert (expected[:, :2] == 0).all()
    pack(model)
    assert_equal(model(x), expected, "silent")


def test_a_companion_goes_along(tmp_path: Path) -> None:
    for structure in ("nm-16", "unstructured"):
        model, inputs = dense_model("vit"), example("vit")
        sparsify(
            model, RULES["vit"], structure=STRUCTURES[structure], density=0.4, low_rank=3,
            learner=RandomPermutation(side="both"),
        )  # fmt: skip
        for layer in sparse_layers(model).values():
            nn.init.normal_(layer.companion.up)  # type: ignore[union-attr]
        expected = model.eval()(inputs).detach()
        loaded = load(exported(tmp_path / structure, model, constructor("vit")))
        assert_equal(loaded(inputs), expected, structure)
        assert all(layer.companion.up.shape[1] == 3 for layer in packed_layers(loaded))  # type: ignore[union-attr]
        plain = dense_model("vit")
        plain.load_state_dict(dense_state(loaded, plain), strict=True)
        assert_equal(plain(inputs).detach(), expected, structure)
        # No number is rounded twice on the way to half precision.
        half = load(tmp_path / structure, dtype=torch.bfloat16)(inputs.bfloat16())
        assert_equal(half.float(), expected, structure, 0.05)


def test_convolutions() -> None:
    cases: list[dict[str, Any]] = [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "bias": False},
        {"kernel_size": (2, 3), "padding": "same", "padding_mode": "reflect"},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "padding": 1},
    ]
    for structure, arguments in zip(cycle(CONVOLVED), 3 * cases):
        model = nn.Sequential(nn.Conv2d(16, 24, **arguments))
        plain = copy.deepcopy(model)
        sparsify(
            model, [Rule("0")], structure=STRUCTURES[structure], density=0.4, low_rank=1,
            learner=RandomPermutation(side="both"),
        )  # fmt: skip
        case = structure, arguments
        x = torch.randn(2, 16, 9, 7)
        expected = model(x).detach()
        pack(model)
        packed = model[0]
        assert isinstance(packed, PackedConv2d)
        assert_equal(model(x), expected, case)
        dense = packed.dense()
        assert type(dense) is nn.Conv2d
        assert_equal(dense(x), expected, case)
        assert_equal(packed.weight, dense.weight, case)
        plain.load_state_dict(dense_state(model, plain), strict=True)
        assert_equal(plain(x).detach(), expected, case)


def test_a_resnet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    plain = copy.deepcopy(model)
    names = [n for n, m in model.named_modules() if getattr(m, "kernel_size", None) == (3, 3)]
    rules = [Rule(name) for name in names if name.startswith("layer")]
    sparsify(model, rules, structure=STRUCTURES["nm-16"], density=0.1, topology="magnitude")
    inputs = torch.randn(2, 3, 64, 64)
    expected = model.eval()(inputs).detach()
    folder = exported(tmp_path / "export", model, {"_target_": "", "arguments": {}})
    loaded = load(folder, model=copy.deepcopy(plain))
    assert len(packed_layers(loaded)) == 16
    assert_equal(loaded(inputs), expected, "packed")
    plain.load_state_dict(dense_state(loaded, plain), strict=True)
    assert_equal(plain.eval()(inputs).detach(), expected, "dense")


class Encoder(nn.Module):
    """Attention that reads the weights of its layers instead of calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        return y + self.attention(y, y, y, need_weights=False)[0]


def test_parents_that_read_weights_find_dense_ones(tmp_path: Path) -> None:
    rules = [Rule("*attn", split=3), Rule("attention", split=3), Rule("*linear?"), Rule("*proj")]
    for structure in ("nm-16", "unstructured"):
        plain = Encoder().eval()
        model = copy.deepcopy(plain)
        sparsify(
            model, rules, structure=STRUCTURES[structure], density=0.4,
            learner=RandomPermutation(side="both"),
        )  # fmt: skip
        x = torch.randn(2, 7, 32)
        expected = model.eval()(x).detach()
        folder = exported(tmp_path / structure, model, {"_target_": "", "arguments": {}})
        loaded = load(folder, model=copy.deepcopy(plain))
        assert len(packed_layers(loaded)) == 6
        for grad in (True, False):  # without gradients the fused fast path
            with torch.set_grad_enabled(grad):
                assert_equal(loaded(x).detach(), expected, (structure, grad))
        for layer in packed_layers(twin := copy.deepcopy(loaded)):
            replace_module(twin, layer, layer.dense())  # as `tune` may
        assert_equal(twin(x).detach(), expected, structure)
        plain.load_state_dict(dense_state(loaded, plain), strict=True)
        assert_equal(plain(x).detach(), expected, structure)


def test_projections_with_budgets_of_their_own(tmp_path: Path) -> None:
    model, inputs = dense_model("vit"), example("vit")
    sparsify(
        model, RULES["vit"], structure=STRUCTURES["nm-16"], density=0.25,
        distribution={"*.qkv.weights.1": 0.5}, learner=RandomPermutation(side="both"),
    )  # fmt: skip
    expected = model(inputs).detach()
    loaded: Any = load(exported(tmp_path / "export", model, constructor("vit")))
    assert len(loaded.blocks[0].attn.qkv.parts) == 3
    assert_equal(loaded(inputs), expected, "packed")
    plain = dense_model("vit")
    plain.load_state_dict(dense_state(loaded, plain))
    assert_equal(plain(inputs).detach(), expected, "dense")


def test_autocast_is_obeyed() -> None:
    for structure in ("nm-16", "unstructured"):
        model, inputs = sparse_model("vit", structure, "random"), example("vit")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = model(inputs)
            pack(model)
            assert_equal(model(inputs), expected, structure, 0.02)
        assert expected.dtype == torch.bfloat16


def test_what_is_known_of_a_model_is_known_after_loading(tmp_path: Path) -> None:
    """Which columns come in runs, and which weights are tied."""
    runs: list[tuple[Life, int]] = [("none", 8), ("random", 1)]
    for life, run in runs:
        model = sparse_model("vit", "block-8", life)
        loaded: Any = load(exported(tmp_path / life, model, constructor("vit")))
        tiles = [layer.tiles for layer in packed_layers(loaded)]
        assert {part.index().column_run for part in tiles if part is not None} == {run}
    folder = exported(tmp_path / "e", sparse_model("gpt2", "nm-16"), constructor("gpt2"))
    names = load_file(folder / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != ("transformer.wte.weight" in names)
    loaded = load(folder, dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_loaded_model_is_a_backbone_under_ddp_with_its_defaults(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for structure in ("unstructured", "nm-16", "diag"):
            model = sparse_model("vit", structure, "random", dim=64, heads=2)
            backbone = load(exported(tmp_path / structure, model, constructor("vit", 64, 2)))
            x = example("vit")
            expected = backbone(x)
            kinds = {name: tensor.dtype for name, tensor in backbone.state_dict().items()}
            head = nn.Linear(expected.shape[-1], 3)
            replica = nn.parallel.DistributedDataParallel(nn.Sequential(backbone, head))
            for _ in range(2):  # every pass broadcasts the buffers
                y = replica(x)
                y.sum().backward()
            assert torch.equal(y, head(expected)), structure
            assert {name: t.dtype for name, t in backbone.state_dict().items()} == kinds
            again = copy.deepcopy(backbone)
            again.load_state_dict(backbone.state_dict())
            assert torch.equal(again(x), expected), structure
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("structure", ["nm-16", "unstructured", "conv"])
def test_gradients_are_those_of_the_dense_weight(structure: str) -> None:
    """In what is stored, which is all that a step of an optimizer changes; and in the input."""
    if structure == "conv":
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1))
        sparsify(model, [Rule("0")], structure=STRUCTURES["nm-16"], density=0.3)
        x = torch.randn(2, 3, 7, 5)
    else:
        model, x = sparse_model("vit", structure, "random", low_rank=2), example("vit")
    pack(model)
    dense = copy.deepcopy(model)
    for layer in packed_layers(dense):
        replace_module(dense, layer, layer.dense())
    outputs = []
    for each in (model, dense):
        inputs = x.clone().requires_grad_()
        y = each.requires_grad_()(inputs)
        y.square().sum().backward()
        assert inputs.grad is not None
        outputs.append((y.detach(), inputs.grad))
    for found, expected in zip(*outputs, strict=True):
        assert_equal(found, expected, structure)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    for name, layer in packed.items():
        whole = dense.get_submodule(name).weight.grad
        assert isinstance(whole, torch.Tensor)
        flat = whole.permute(0, *range(2, whole.dim()), 1).flatten(1)
        first = 0
        for part in layer.weights():
            gradient = part.values.grad
            assert gradient is not None
            where, own = copy.deepcopy(part), copy.deepcopy(part)
            where.values.data.fill_(1)
            own.values.data.copy_(gradient)
            rows = slice(first, first + part.out_features)
            assert_equal(own.matrix().detach(), flat[rows] * where.matrix().detach(), name)
            first += part.out_features


def test_soft_choices_are_refused_before_anything_changes_and_hardened_if_asked() -> None:
    model = sparse_model("vit", "nm-16", "soft")
    with pytest.raises(ValueError, match=r"^pack: blocks\.0\.attn\.qkv\.\S+ is still soft"):
        pack(model)
    assert len(sparse_layers(model)) == 8 and not packed_layers(model)
    names = harden(model)
    assert len(names) == 20 and names == sorted(names)
    assert harden(model) == []


def test_what_a_selection_does_not_choose_is_not_exported() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    sparsify(model, [Rule("0")], structure=STRUCTURES["diag"], density=0.5, learner=learned())
    (weight,) = sparse_weights(model).values()
    topology = weight.topology()
    target = topology.target // 4
    few = copy.copy(topology)
    object.__setattr__(few, "target", target)
    weight.select(Selection(few, torch.randn(len(topology.active))))
    layer = model[0]
    assert isinstance(layer, SparseLinear)
    assert set(harden(model)) >= {"0.weights.0.selection", "0.input_permutation"}
    assert len(weight.active) == int(target.sum())
    x = torch.randn(3, 64)
    expected = model(x).detach()
    described = pack(model)
    assert described["0"]["density"] == pytest.approx(int(target.sum()) * 64 / 64**2)
    assert_equal(model(x), expected, "selected")


def test_compiles_without_a_break() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32), nn.Conv2d(2, 4, 3))
    for name, structure in enumerate(("block-8", "unstructured", "unstructured")):
        sparsify(model, [Rule(str(name))], structure=STRUCTURES[structure], density=0.5, low_rank=1)
    pack(model)
    x = torch.randn(2, 2, 5, 32)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(x), expected, "compiled")
