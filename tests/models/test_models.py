"""Models have the published sizes, map tiny inputs to logits, and say what does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("name", ["gpt2", "llama_60m"])
def test_fresh_weights_spread_as_told(name: str) -> None:
    mlp = {"mlp_dim": 64} if name == "llama_60m" else {}
    model = build(small(name, dim=64, init_std=0.5, **mlp), "model", SMALL_TEXT)
    inner = model.transformer.h[0].mlp.c_fc if name == "gpt2" else model.model.layers[0].mlp.up_proj
    assert inner.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert mistake(small(name, init_std=0, **mlp), SMALL_TEXT) == (
        "model.init_std: expected a number above 0, got 0.0"
    )


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
    tokens = torch.arange(16).reshape(2, 8) % 11
    plain = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded.eval()(tokens), plain.eval()(tokens).logits)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for key, value in (("depth", 2), ("heads", 1)):
        other = small("gpt2", **{"depth": 1, key: value}, checkpoint=str(tmp_path))
        with pytest.raises(UserError, match=rf"^model\.{key}: expected \d as in .*, got {value}$"):
            build(other, "model", SMALL_TEXT)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.h.0.attn.c_attn.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"^model\.checkpoint: expected weights of .* without \S+$"):
        build(same, "model", SMALL_TEXT)


def test_a_gpt2_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    node = small("gpt2", depth=1, checkpoint=str(tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name, value in (
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-3),
        ("n_inner", 32),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
        ("model_type", "llama"),
    ):
        path.write_text(json.dumps({**config, name: value}))
        line = mistake(node, SMALL_TEXT)
        assert line.startswith(f"model.checkpoint: expected a model with {name}=")
        assert line.endswith(f"with {name}={value}")
    path.write_text(json.dumps({**config, "n_inner": 64, "resid_pdrop": 0.5}))
    build(node, "model", SMALL_TEXT)


def test_a_llama_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8}
    config = LlamaConfig(**sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    node = small("llama_60m", dim=16, mlp_dim=24, depth=1, heads=2, checkpoint=str(tmp_path))
    build(node, "model", SMALL_TEXT)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for change, named in (
        ({"hidden_act": "gelu"}, "hidden_act=silu"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-06"),
        ({"rope_theta": 500000.0}, "rope_theta=10000.0"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta=10000.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type=default"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_type=default"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=2"),
        ({"head_dim": 4}, "head_dim=8"),
        ({"attention_bias": True}, "attention_bias=False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=False"),
        ({"model_type": "mistral"}, "model_type=llama"),
    ):
        path.write_text(json.dumps({**stored, **change}))
        line = mistake(node, SMALL_TEXT)
        assert line.startswith(f"model.checkpoint: expected a model with {named}, got "), line
    path.write_text(json.dumps({**stored, "intermediate_size": 32}))
    assert mistake(node, SMALL_TEXT).startswith("model.mlp_dim: expected 32 as in ")


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    state = build(small("vit"), "model", SMALL_IMAGES).state_dict()
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    nan = {key: torch.full_like(value, torch.nan) for key, value in state.items()}
    torch.save(nan, tmp_path / "nan.pth")
    for name in ("a.pth", "a.safetensors", "model.safetensors", "config.json"):
        path = tmp_path / name
        whole = path.read_bytes()
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        for content in (b"", pointer, whole[: len(whole) // 2], whole[:9], b"\xff" * 99, b"[1]"):
            path.write_bytes(content)
            if name.startswith("a."):
                line = mistake(small("vit", checkpoint=str(path)), SMALL_IMAGES)
                assert ("Git LFS" in line) == (content == pointer)
            else:
                line = mistake(small("gpt2", depth=1, checkpoint=str(tmp_path)), SMALL_TEXT)
            assert line.startswith("model.checkpoint: expected weights to load, got ")
            assert str(path.parent) in line
            assert len(line) < 500
        path.write_bytes(whole)
    for content in (None, [1], {"model": 3}, {"head.bias": 3}, {1: 2}):
        torch.save(content, tmp_path / "odd.pth")
        line = mistake(small("vit", checkpoint=str(tmp_path / "odd.pth")), SMALL_IMAGES)
        assert line.startswith("model.checkpoint: expected weights to load, got ")
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    line = mistake(small("gpt2", depth=1, checkpoint=str(tmp_path)), SMALL_TEXT)
    assert line.startswith("model.checkpoint: expected weights that are finite")
    line = mistake(small("vit", checkpoint=str(tmp_path / "nan.pth")), SMALL_IMAGES)
    assert line.endswith("(a weight is not finite)")


def test_a_backbone_without_a_head_leaves_it_fresh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, head in (("vit", "head"), ("mixer", "head")):
        state = build(small(name), "model", SMALL_IMAGES).state_dict()
        bare = {key: value for key, value in state.items() if not key.startswith(head)}
        mae = {"decoder_embed.weight": torch.ones(3), "mask_token": torch.ones(1)}
        for content in (bare, {"model": {**bare, **mae}}, {**bare, f"{head}.bias": torch.ones(3)}):
            torch.save(content, tmp_path / "weights.pth")
            node = small(name, checkpoint=str(tmp_path / "weights.pth"))
            capsys.readouterr()
            loaded = build(node, "model", SMALL_IMAGES).state_dict()
            assert all(torch.equal(loaded[key], value) for key, value in bare.items())
            assert not torch.equal(loaded[f"{head}.bias"], torch.ones(3))
            said = capsys.readouterr().err.splitlines()
            (line,) = [line for line in said if line.startswith("model.checkpoint: ")]
            assert "the classifier in " in line
            assert line.endswith("it starts fresh")
