"""Models have the published sizes, map tiny inputs to logits, and say what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from padst_exp.config import build, config_dir
from padst_exp.errors import UserError

IMAGES = {"image_size": 224, "channels": 3, "num_classes": 1000}
SMALL_IMAGES = {"image_size": 8, "channels": 1, "num_classes": 3}
TEXT = {"vocab_size": 50257, "context_length": 1024}
SMALL_TEXT = {"vocab_size": 11, "context_length": 8}


def model_config(model: str, /, **changes: Any) -> DictConfig:
    node = OmegaConf.load(config_dir() / "model" / f"{model}.yaml").model
    return OmegaConf.merge(node, changes)


def small(model: str, /, **changes: Any) -> DictConfig:
    sizes = {"dim": 16, "depth": 2}
    if model != "mixer":
        sizes["heads"] = 2
    if model in ("vit", "mixer"):
        sizes["patch_size"] = 4
    return model_config(model, **{**sizes, **changes})


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("vit", IMAGES, 86_567_656),
        ("deit_tiny", IMAGES, 5_717_416),
        ("vit_large", IMAGES, 304_326_632),
        ("mixer", IMAGES, 18_528_264),
        ("gpt2", TEXT, 124_439_808),
        ("gpt2_medium", TEXT, 354_823_168),
    ],
)
def test_published_sizes(name: str, shape: dict[str, object], parameters: int) -> None:
    with torch.device("meta"):
        model = build(model_config(name), "model", shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    names = {module for module, _ in model.named_modules()}
    for rule in OmegaConf.load(config_dir() / "model" / f"{name}.yaml").sparse:
        assert rule.pattern.replace("*", "1") in names


@pytest.mark.parametrize("name", ["vit", "mixer"])
def test_images_to_logits(name: str) -> None:
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


@pytest.mark.parametrize("name", ["vit", "mixer"])
def test_weights_from_a_file(name: str, tmp_path: Path) -> None:
    trained = build(small(name), "model", SMALL_IMAGES)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    node = small(name, checkpoint=str(tmp_path / "weights.pth"))
    state = build(node, "model", SMALL_IMAGES).state_dict()
    assert all(torch.equal(state[key], value) for key, value in trained.state_dict().items())

    more_classes = build(node, "model", {**SMALL_IMAGES, "num_classes": 5}).state_dict()
    assert more_classes["head.weight"].shape == (5, 16)
    body = "blocks.1.mlp.fc1.weight" if name == "vit" else "blocks.1.mlp_tokens.fc1.weight"
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


@pytest.mark.parametrize(
    ("name", "changes", "shape", "message"),
    [
        ("gpt2", {}, SMALL_IMAGES, "model: .* does not fit the data set, which gives image_size"),
        ("vit", {}, SMALL_TEXT, "model: .* does not fit the data set, which gives vocab_size"),
        ("vit", {"patch_size": 3}, SMALL_IMAGES, r"model\.patch_size: expected a divisor of .* 8"),
        ("mixer", {"patch_size": 16}, SMALL_IMAGES, r"model\.patch_size: expected a divisor"),
        ("mixer", {"mlp_ratio": [1.0]}, SMALL_IMAGES, r"model\.mlp_ratio: expected two numbers"),
        ("vit", {"heads": 3}, SMALL_IMAGES, r"model\.heads: expected a divisor of dim=16, got 3"),
        ("gpt2", {"heads": 3}, SMALL_TEXT, r"model\.heads: expected a divisor of dim=16, got 3"),
        ("vit", {"checkpoint": "/nowhere"}, SMALL_IMAGES, r"model\.checkpoint: no file /nowhere"),
        ("gpt2", {"checkpoint": "/nowhere"}, SMALL_TEXT, r"model\.checkpoint: no folder /nowhere"),
        ("gpt2", {"pretrained": True, "checkpoint": "x"}, SMALL_TEXT, r"model\.checkpoint: set ei"),
        ("vit", {"pretrained": True, "name": "resnet"}, SMALL_IMAGES, r"model\.name: timm has no"),
    ],
)
def test_what_does_not_fit_is_one_line(
    name: str, changes: dict[str, Any], shape: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^{message}[^\n]*$"):
        build(small(name, **changes), "model", shape)


def test_wrong_weights_are_one_line(tmp_path: Path) -> None:
    torch.save(build(small("vit"), "model", SMALL_IMAGES).state_dict(), tmp_path / "weights.pth")
    node = small("vit", dim=32, checkpoint=str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match=r"^model\.checkpoint: .*cannot be loaded \([^\n]+\)$"):
        build(node, "model", SMALL_IMAGES)


def test_gpt2_weights_load_in_float32_and_must_be_complete(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes)).bfloat16().save_pretrained(tmp_path)
    same = small("gpt2", depth=1, checkpoint=str(tmp_path))
    loaded = build(same, "model", SMALL_TEXT)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    deeper = small("gpt2", depth=2, checkpoint=str(tmp_path))
    with pytest.raises(UserError, match=r"^model\.checkpoint: \S+ has no \S+, expected weights"):
        build(deeper, "model", SMALL_TEXT)
