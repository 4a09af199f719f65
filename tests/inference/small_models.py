"""Small models as a training leaves them: every structure, choices in every phase of their life."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.inference import pack
from padst_exp.inference.files import write
from padst_exp.inference.packing import harden
from padst_exp.models.language import gpt2
from padst_exp.models.vision import vit
from padst_exp.permutations import RandomPermutation
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import Storage
from permutation_cases import learned
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
    if structure.geometry(64, 64, 0.3).tiling() is not None
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
        "init_std": 0.02,
        "vocab_size": 13, "context_length": 9,
    },
}  # fmt: skip


def dense_model(family: Family, dim: int = 64, heads: int = 2) -> nn.Module:
    """A model with nothing at its initial value that would hide a mistake."""
    torch.manual_seed(0)
    build = {"vit": vit, "gpt2": gpt2}[family]
    model = build(dim=dim, heads=heads, **ARGUMENTS[family])  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def constructor(family: Family, dim: int = 64, heads: int = 2) -> dict[str, object]:
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
    low_rank: int = 0,
) -> nn.Module:
    """A sparse model in eval mode, as a training would leave it."""
    model = dense_model(family, dim, heads)
    learner = {
        "none": None,
        "random": RandomPermutation(side="both"),
        "hardened": learned(),
        "soft": learned(),
    }[life]
    sparsify(
        model, RULES[family], structure=STRUCTURES[structure], density=density, learner=learner,
        storage=storage, low_rank=low_rank,
    )  # fmt: skip
    if life == "hardened":
        harden(model)
    return model.eval()


def example(family: Family, batch: int = 3) -> Tensor:
    if family == "vit":
        return torch.randn(batch, 1, 12, 12)
    return torch.randint(13, (batch, 9))


def exported(folder: Path, model: nn.Module, constructor: object = "") -> Path:
    """Harden, pack and write `model`, as the entry point does."""
    harden(model)
    description = {"model": constructor, "layers": pack(model), "config": ""}
    write(folder, model.state_dict(), description, extra={}, overwrite=False)
    return folder


def assert_equal(found: Tensor, expected: Tensor, case: object, tolerance: float = 1e-5) -> None:
    """Equal up to rounding; `case` names what was tried."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, case
    error = (found - expected).detach().float().norm()
    assert error <= tolerance * expected.detach().float().norm(), (case, float(error))
