"""Trained-looking small models: every structure, permutations in every phase of their life."""

from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.layers import permutations
from padst_exp.models.language import gpt2
from padst_exp.models.vision import vit
from padst_exp.permutations import DoublyStochastic, RandomPermutation
from padst_exp.sparsify import Report, Rule, sparsify
from padst_exp.structures import Storage
from structure_cases import STRUCTURES

Life = Literal["none", "random", "hardened", "soft"]
Family = Literal["vit", "gpt2"]

RULES = {
    "vit": [Rule("blocks.*.attn.qkv", 3), Rule("blocks.*.attn.proj"), Rule("blocks.*.mlp.fc?")],
    "gpt2": [
        Rule("transformer.h.*.attn.c_attn", 3),
        Rule("transformer.h.*.attn.c_proj"),
        Rule("transformer.h.*.mlp.c_fc"),
        Rule("transformer.h.*.mlp.c_proj"),
    ],
}
TILED = [
    name
    for name, structure in STRUCTURES.items()
    if structure.layout(64, 64, 0.3).tile_shape is not None
]
TARGETS = {"vit": "padst_exp.models.vision.vit", "gpt2": "padst_exp.models.language.gpt2"}
ARGUMENTS = {
    "vit": {
        "name": "vit_tiny_patch16_224", "pretrained": False, "checkpoint": None, "patch_size": 4,
        "depth": 2, "mlp_ratio": 1.5, "drop_path": 0.1, "layer_scale": 0.3, "image_size": 12,
        "channels": 1, "num_classes": 5,
    },
    "gpt2": {
        "name": "gpt2", "pretrained": False, "checkpoint": None, "depth": 2, "dropout": 0.1,
        "vocab_size": 13, "context_length": 9,
    },
}  # fmt: skip


def dense_model(family: Family, dim: int, heads: int) -> nn.Module:
    """A model with nothing at its initial value that would hide a mistake."""
    torch.manual_seed(0)
    build = {"vit": vit, "gpt2": gpt2}[family]
    model = build(dim=dim, heads=heads, **ARGUMENTS[family])  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def constructor(family: Family, dim: int, heads: int) -> dict[str, object]:
    return {
        "_target_": TARGETS[family],
        "arguments": {"dim": dim, "heads": heads, **ARGUMENTS[family]},
    }


def sparse_model(
    family: Family,
    structure: str,
    life: Life = "none",
    *,
    dim: int = 64,
    heads: int = 2,
    storage: Storage = "packed",
    density: float = 0.3,
) -> tuple[nn.Module, Report]:
    """A sparse model in eval mode, as a training would leave it."""
    model = dense_model(family, dim, heads)
    learner = {
        "none": None,
        "random": RandomPermutation(side="both"),
        "hardened": DoublyStochastic(side="both"),
        "soft": DoublyStochastic(side="both"),
    }[life]
    report = sparsify(
        model, RULES[family], structure=STRUCTURES[structure], density=density, learner=learner,
        storage=storage,
    )  # fmt: skip
    if life == "hardened":
        for permutation in permutations(model).values():
            permutation.harden()
    return model.eval(), report


def example(family: Family, batch: int = 3) -> Tensor:
    if family == "vit":
        return torch.randn(batch, 1, 12, 12)
    return torch.randint(13, (batch, 9))
