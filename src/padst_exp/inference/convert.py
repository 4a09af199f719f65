"""Find the block stack of a timm ViT or a GPT-2 and build its feature-major form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from padst_exp.inference.blocks import FeatureBlock, FeatureStack
from padst_exp.inference.features import Around, FeatureLinear
from padst_exp.inference.linear import PackedLinear, TiledLinear, dense_linear

Layer = PackedLinear | nn.Linear
Build = Callable[[str, Layer, Around], FeatureLinear]
"""Makes one product of a block, given its module name, its layer and what is around it."""

Gelu = Literal["none", "tanh", "exact"]


def stack_name(model: nn.Module) -> str:
    """Module name of the block stack: `blocks` of a timm ViT, `transformer.h` of GPT-2.

    Raises:
        ValueError: the model has neither.
    """
    for name, kind in (("blocks", Block), ("transformer.h", GPT2Block)):
        try:
            stack = model.get_submodule(name)
        except AttributeError:
            continue
        blocks = list(stack.children())
        if blocks and all(type(block) is kind for block in blocks):
            return name
    raise ValueError("it has no stack of blocks of a timm ViT or of GPT-2")


@torch.no_grad()
def feature_stack(model: nn.Module, build: Build) -> nn.Module:
    """The feature-major form of the block stack of `model`, to take the place of it.

    Args:
        model: loaded from an export.
        build: makes the products; called for each in turn.

    Raises:
        ValueError: the model has no such stack, nothing tiled in it, or blocks that do something
            which has no feature-major form.
    """
    name = stack_name(model)
    stack = model.get_submodule(name)
    if not any(isinstance(module, TiledLinear) for module in stack.modules()):
        raise ValueError("no layer of its blocks has tiles")
    convert = _vit_block if name == "blocks" else _gpt2_block
    blocks = [
        convert(f"{name}.{number}", block, build) for number, block in enumerate(stack.children())
    ]
    converted = FeatureStack(blocks).eval()
    # GPT-2 loops over its blocks.
    return converted if name == "blocks" else nn.ModuleList([converted])


def _vit_block(name: str, block: Any, build: Build) -> FeatureBlock:
    attention, mlp = block.attn, block.mlp
    plain = type(attention) is Attention and type(mlp) is Mlp and attention.gate is None
    between = (attention.q_norm, attention.k_norm, attention.norm, mlp.norm) if plain else ()
    if not plain or any(not isinstance(module, nn.Identity) for module in between):
        raise ValueError(f"{name} has more than plain attention and a plain MLP")
    if type(mlp.act) is not nn.GELU:
        raise ValueError(f"{name}.mlp.act is {type(mlp.act).__name__}, not GELU")
    gelu: Gelu = "tanh" if mlp.act.approximate == "tanh" else "exact"
    return FeatureBlock(
        **_products(
            build,
            name,
            {
                "qkv": ("attn.qkv", attention.qkv),
                "proj": ("attn.proj", attention.proj),
                "fc1": ("mlp.fc1", mlp.fc1),
                "fc2": ("mlp.fc2", mlp.fc2),
            },
            norms=(block.norm1, block.norm2),
            scales=(_layer_scale(block.ls1), _layer_scale(block.ls2)),
            gelu=gelu,
        ),
        epsilons=(block.norm1.eps, block.norm2.eps),
        heads=attention.num_heads,
        scale=attention.scale,
        causal=False,
    )


def _gpt2_block(name: str, block: Any, build: Build) -> FeatureBlock:
    attention, mlp = block.attn, block.mlp
    config = attention.config
    if hasattr(block, "crossattention") or config.reorder_and_upcast_attn:
        raise ValueError(f"{name} has more than plain attention")
    gelus: dict[str, Gelu] = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
    if config.activation_function not in gelus:
        raise ValueError(f"{name}.mlp.act is {config.activation_function}, not GELU")
    return FeatureBlock(
        **_products(
            build,
            name,
            {
                "qkv": ("attn.c_attn", attention.c_attn),
                "proj": ("attn.c_proj", attention.c_proj),
                "fc1": ("mlp.c_fc", mlp.c_fc),
                "fc2": ("mlp.c_proj", mlp.c_proj),
            },
            norms=(block.ln_1, block.ln_2),
            scales=(None, None),
            gelu=gelus[config.activation_function],
        ),
        epsilons=(block.ln_1.eps, block.ln_2.eps),
        heads=attention.num_heads,
        scale=attention.scaling,
        causal=True,
    )


def _products(
    build: Build,
    name: str,
    layers: dict[str, tuple[str, nn.Module]],
    *,
    norms: tuple[nn.Module, nn.Module],
    scales: tuple[Tensor | None, Tensor | None],
    gelu: Gelu,
) -> dict[str, Any]:
    first, second = norms
    if not isinstance(first, nn.LayerNorm) or not isinstance(second, nn.LayerNorm):
        raise ValueError(f"{name} has other norms than LayerNorm")
    around = {
        "qkv": Around(norm=first, feature_major=False),
        "proj": Around(scale=scales[0], reads_feature_major=False, residual=True),
        "fc1": Around(norm=second, gelu=gelu),
        "fc2": Around(scale=scales[1], residual=True),
    }
    return {
        role: build(f"{name}.{path}", _layer(f"{name}.{path}", layer), around[role])
        for role, (path, layer) in layers.items()
    }


def _layer(name: str, layer: nn.Module) -> Layer:
    if isinstance(layer, Conv1D):
        return dense_linear(layer.weight.t(), layer.bias)
    if isinstance(layer, TiledLinear | nn.Linear):
        return layer
    raise ValueError(f"{name}, a {type(layer).__name__}, has no feature-major form")


def _layer_scale(module: nn.Module) -> Tensor | None:
    return module.gamma.detach() if isinstance(module, LayerScale) else None
