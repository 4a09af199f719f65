"""Models have the published sizes, map tiny inputs to logits, and say what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from from_yaml import leaf
from padst_exp.config import build
from padst_exp.errors import UserError

IMAGES: dict[str, object] = {"image_size": 224, "channels": 3, "num_classes": 1000}
SMALL_IMAGES: dict[str, object] = {"image_size": 8, "channels": 1, "num_classes": 3}
TEXT: dict[str, object] = {"vocab_size": 50257, "context_length": 1024}
SMALL_TEXT: dict[str, object] = {"vocab_size": 11, "context_length": 8}


def small(model: str, /, **changes: Any) -> DictConfig:
    sizes = {"dim": 16, "depth": 2}
    if model != "mixer":
        sizes["heads"] = 2
    if model in ("vit", "mixer"):
        sizes["patch_size"] = 4
    return leaf(f"model/{model}", **{**sizes, **changes})


def test_published_sizes() -> None:
    for name, shape, parameters in (
        ("vit", IMAGES, 86_567_656),
        ("deit_tiny", IMAGES, 5_717_416),
        ("vit_large", IMAGES, 304_326_632),
        ("mixer", IMAGES, 18_528_264),
        ("gpt2", TEXT, 124_439_808),
        ("gpt2_medium", TEXT, 354_823_168),
    ):
        with torch.device("meta"):
            model = build(leaf(f"model/{name}"), "model", shape)
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_images_to_logits() -> None:
    for name in ("vit", "mixer"):
        model = build(small(name, drop_path=0.1), "model", SMALL_IMAGES)
        logits = model(torch.randn(2, 1, 8, 8))
        assert logits.shape == (2, 3)
        logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_tokens_to_logits() -> None:
    model = build(small("gpt2"), "model", SMALL_TEXT).eval()
    tokens = torch.randint(11, (2, 6))
    logits = model(tokens)
    assert logits.shape == (2, 6, 11)
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % 11
    assert torch.equal(model(changed)[:, :-1], logits[:, :-1]), "the future must not matter"
    assert not torch.equal(model(changed)[:, -1], logits[:, -1])
    assert model.transformer.config._attn_implementation == "sdpa"
    assert model.lm_head.weight is model.transformer.wte.weight


def test_layer_scale_starts_where_it_is_told() -> None:
    model = build(small("vit", layer_scale=1e-4), "model", SMALL_IMAGES)
    assert torch.equal(model.blocks[0].ls1.gamma, torch.full((16,), 1e-4))


def test_weights_from_a_file(tmp_path: Path) -> None:
    for name, body in (("vit", "mlp.fc1"), ("mixer", "mlp_tokens.fc1")):
        check_weights_from_a_file(name, f"blocks.1.{body}.weight", tmp_path)


def check_weights_from_a_file(name: str, body: str, tmp_path: Path) -> None:
    trained = build(small(name), "model", SMALL_IMAGES)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    node = small(name, checkpoint=str(tmp_path / "weights.pth"))
    state = build(node, "model", SMALL_IMAGES).state_dict()
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())

    more_classes = build(node, "model", {**SMALL_IMAGES, "num_classes": 5}).state_dict()
    assert more_classes["head.weight"].shape == (5, 16)
    assert torch.equal(more_classes[body], state[body])


def test_gpt2_weights_from_a_folder(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    lm = GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    ).eval()
    lm.save_pretrained(tmp_path)
    model = build(small("gpt2", checkpoint=str(tmp_path)), "model", SMALL_TEXT).eval()
    tokens = torch.randint(11, (1, 5))
    torch.testing.assert_close(model(tokens), lm(tokens).logits)


def mistake(node: DictConfig, shape: dict[str, object]) -> str:
    with pytest.raises(UserError) as error:
        build(node, "model", shape)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_one_line() -> None:
    images: dict[str, dict[str, Any]] = {
        "model.patch_size: expected a divisor of the image size 8, got 3": {"patch_size": 3},
        "model.heads: expected a divisor of model.dim=16, got 3": {"heads": 3},
        "model.checkpoint: expected an existing file, got /no": {"checkpoint": "/no"},
        "model.name: expected a name that timm has ": {"pretrained": True, "name": "resnet"},
    }
    text: dict[str, dict[str, Any]] = {
        "model.heads: expected a divisor of model.dim=16, got 3": {"heads": 3},
        "model.checkpoint: expected an existing folder, got /no": {"checkpoint": "/no"},
        "model.checkpoint: expected null beside ": {"pretrained": True, "checkpoint": "x"},
    }
    for message, changes in images.items():
        assert mistake(small("vit", **changes), SMALL_IMAGES).startswith(message)
    for message, changes in text.items():
        assert mistake(small("gpt2", **changes), SMALL_TEXT).startswith(message)
    assert mistake(small("mixer", patch_size=16), SMALL_IMAGES).startswith("model.patch_size: ")
    assert mistake(small("mixer", mlp_ratio=[1.0]), SMALL_IMAGES).startswith("model.mlp_ratio: ")
    assert "does not fit the data set, which gives image_size" in mistake(
        small("gpt2"), SMALL_IMAGES
    )
    assert "does not fit the data set, which gives vocab_size" in mistake(small("vit"), SMALL_TEXT)


def test_wrong_weights_are_one_line(tmp_path: Path) -> None:
    torch.save(build(small("vit"), "model", SMALL_IMAGES).state_dict(), tmp_path / "weights.pth")
    node = small("vit", dim=32, checkpoint=str(tmp_path / "weights.pth"))
    with pytest.raises(
        UserError, match=r"^model\.checkpoint: expected weights to load, got .* \([^\n]+\)$"
    ):
        build(node, "model", SMALL_IMAGES)


def test_gpt2_weights_load_in_float32_and_must_be_complete(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes)).bfloat16().save_pretrained(tmp_path)
    same = small("gpt2", depth=1, checkpoint=str(tmp_path))
    loaded = build(same, "model", SMALL_TEXT)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    deeper = small("gpt2", depth=2, checkpoint=str(tmp_path))
    with pytest.raises(UserError, match=r"^model\.checkpoint: expected weights of .* without \S+$"):
        build(deeper, "model", SMALL_TEXT)
