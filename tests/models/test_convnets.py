"""ResNets, MobileNetV2 and LLaMA: published sizes, other widths, stems for small images."""

from typing import Any

import pytest
import torch
from torch import nn

from from_yaml import leaf
from padst_exp.config import build
from padst_exp.errors import UserError

IMAGES: dict[str, object] = {"image_size": 224, "channels": 3, "num_classes": 1000}
SMALL: dict[str, object] = {"image_size": 8, "channels": 1, "num_classes": 3}


def model(name: str, shape: dict[str, object], /, device: str = "cpu", **changes: Any) -> nn.Module:
    with torch.device(device):
        return build(leaf(f"model/{name}", **changes), "model", shape)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_sizes() -> None:
    text = {"vocab_size": 32000, "context_length": 256}
    for name, shape, parameters in (
        ("resnet18", IMAGES, 11_689_512),
        ("resnet34", IMAGES, 21_797_672),
        ("resnet50", IMAGES, 25_557_032),
        ("mobilenet_v2", IMAGES, 3_504_872),
        ("deit_small", IMAGES, 22_050_664),
        ("vit_small", IMAGES, 22_050_664),
        ("llama_60m", text, 58_073_600),
        ("llama_130m", text, 134_105_856),
        ("gpt3_small", {"vocab_size": 50257, "context_length": 2048}, 125_226_240),
    ):
        assert size(model(name, shape, "meta")) == parameters, name


def test_resnets_are_those_of_timm() -> None:
    import timm

    for name in ("resnet18", "resnet50", "mobilenetv2_100"):
        ours = model(name.replace("netv2_100", "net_v2"), IMAGES, "meta").state_dict()
        with torch.device("meta"):
            theirs = timm.create_model(name).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_widths_and_stems_of_small_images() -> None:
    for name in ("resnet18", "resnet50", "mobilenet_v2"):
        for width in (0.25, 0.4):
            small = model(name, SMALL, width=width, stem="cifar")
            logits = small(torch.randn(2, 1, 8, 8))
            assert logits.shape == (2, 3)
            logits.square().mean().backward()
            assert all(parameter.grad is not None for parameter in small.parameters())
    halved = model("resnet18", SMALL, "meta", width=0.5, stem="cifar")
    whole = model("resnet18", SMALL, "meta", stem="cifar")
    shapes = [
        {n: p.shape for n, p in module.named_parameters() if p.dim() == 4 and n != "conv1.weight"}
        for module in (halved, whole)
    ]
    assert {n: (2 * s[0], 2 * s[1]) for n, s in shapes[0].items()} == {
        n: tuple(s[:2]) for n, s in shapes[1].items()
    }


def test_blocks_start_as_identities_where_told() -> None:
    for zero in (True, False):
        small: Any = model("resnet18", SMALL, width=0.25, stem="cifar", zero_init_last=zero)
        assert bool((small.layer1[0].bn2.weight == 0).all()) is zero


def test_llama_is_causal_and_has_projections_of_its_own() -> None:
    llama: Any = model(
        "llama_60m", {"vocab_size": 11, "context_length": 8}, dim=16, mlp_dim=24, depth=2, heads=2
    ).eval()
    tokens = torch.randint(11, (2, 6))
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % 11
    assert torch.equal(llama(changed)[:, :-1], llama(tokens)[:, :-1])
    assert not torch.equal(llama(changed)[:, -1], llama(tokens)[:, -1])
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    assert all(
        isinstance(getattr(llama.model.layers[1].self_attn, f"{p}_proj"), nn.Linear) for p in "qkvo"
    )


def test_what_does_not_fit_is_one_line() -> None:
    mistakes: dict[str, dict[str, Any]] = {
        "model.stem: expected cifar for images of 28 pixels, at least 8, got imagenet": {},
        "model.depths: expected at least one block in each stage, and at most 1000 in all, got": {
            "depths": [1, 0, 1, 1]
        },
        "model.width: expected a factor that leaves a channel, got 0.0": {"width": 0.0},
        "model.checkpoint: expected an existing file, got /no": {"checkpoint": "/no"},
        "model.heads: expected one whose double divides model.dim=20, got 3": {"dim": 20},
    }
    for message, changes in mistakes.items():
        images = {**IMAGES, "image_size": 28 if "28" in message else 224}
        with pytest.raises(UserError) as error:
            if "heads" in message:
                model("llama_60m", {"vocab_size": 11, "context_length": 8}, heads=3, **changes)
            else:
                model("resnet18", images, "meta", **changes)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
