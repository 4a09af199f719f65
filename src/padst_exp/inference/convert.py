"""Find the block stack of a timm ViT or a GPT-2 and build its feature-major form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from padst_exp.inference.blocks import FeatureBlock, FeatureStack
from padst_exp.inference.features import FeatureLinear, Fusion
from padst_exp.inference.linear import PackedLinear, dense_linear
from padst_exp.layers.views import imported

Layer = PackedLinear | nn.Linear
Build = Callable[[str, Layer, Fusion], FeatureLinear]
"""Makes one product of a block, given its module name, its layer and what is fused with it."""

Gelu = Literal["none", "tanh", "exact"]


class _Block(NamedTuple):
    """What there is in a block of either family: see `FeatureBlock` and `Fusion`."""

    products: tuple[str, str, str, str]  # qkv, proj, fc1, fc2
    norms: tuple[nn.Module, nn.Module]
    scales: tuple[Tensor | None, Tensor | None]
    gelu: Gelu
    heads: int
    scale: float
    causal: bool


def stack_name(model: nn.Module) -> str:
    """Module name of the block stack: `blocks` of a timm ViT, `transformer.h` of GPT-2.

    Raises:
        ValueError: the model has neither.
    """
    gpt2_block = imported("transformers.models.gpt2.modeling_gpt2", "GPT2Block")
    for name, kind in (("blocks", Block), ("transformer.h", gpt2_block)):
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
    packed = (module for module in stack.modules() if isinstance(module, PackedLinear))
    if all(layer.tiles is None for layer in packed):
        raise ValueError("no layer of its blocks has tiles")
    describe = _vit_block if name == "blocks" else _gpt2_block
    blocks = [
        _converted(f"{name}.{number}", block, describe(f"{name}.{number}", block), build)
        for number, block in enumerate(stack.children())
    ]
    converted = FeatureStack(blocks).eval()
    # GPT-2 loops over its blocks.
    return converted if name == "blocks" else nn.ModuleList([converted])


def _vit_block(name: str, block: Any) -> _Block:
    attention, mlp = block.attn, block.mlp
    plain = type(attention) is Attention and type(mlp) is Mlp and attention.gate is None
    between = (attention.q_norm, attention.k_norm, attention.norm, mlp.norm) if plain else ()
    if not plain or any(not isinstance(module, nn.Identity) for module in between):
        raise ValueError(f"{name} has more than plain attention and a plain MLP")
    if type(mlp.act) is not nn.GELU:
        raise ValueError(f"{name}.mlp.act is {type(mlp.act).__name__}, not GELU")
    return _Block(
        products=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        norms=(block.norm1, block.norm2),
        scales=(_layer_scale(block.ls1), _layer_scale(block.ls2)),
        gelu="tanh" if mlp.act.approximate == "tanh" else "exact",
        heads=attention.num_heads,
        scale=attention.scale,
        causal=False,
    )


def _gpt2_block(name: str, block: Any) -> _Block:
    attention, config = block.attn, block.attn.config
    if hasattr(block, "crossattention") or config.reorder_and_upcast_attn:
        raise ValueError(f"{name} has more than plain attention")
    gelus: dict[str, Gelu] = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
    if config.activation_function not in gelus:
        raise ValueError(f"{name}.mlp.act is {config.activation_function}, not GELU")
    return _Block(
        products=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        norms=(block.ln_1, block.ln_2),
        scales=(None, None),
        gelu=gelus[config.activation_function],
        heads=attention.num_heads,
        scale=attention.scaling,
        causal=True,
    )


def _converted(name: str, block: nn.Module, has: _Block, build: Build) -> FeatureBlock:
    first, second = has.norms
    if not isinstance(first, nn.LayerNorm) or not isinstance(second, nn.LayerNorm):
        raise ValueError(f"{name} has other norms than LayerNorm")
    fusions = (
        Fusion(norm=first, feature_major=False),
        Fusion(scale=has.scales[0], reads_feature_major=False, residual=True),
        Fusion(norm=second, gelu=has.gelu),
        Fusion(scale=has.scales[1], residual=True),
    )
    qkv, proj, fc1, fc2 = (
        build(f"{name}.{path}", _layer(f"{name}.{path}", block.get_submodule(path)), fusion)
        for path, fusion in zip(has.products, fusions, strict=True)
    )
    heads, scale, causal = has.heads, has.scale, has.causal
    epsilons = first.eps, second.eps
    return FeatureBlock(qkv, proj, fc1, fc2, epsilons, heads=heads, scale=scale, causal=causal)


def _layer(name: str, layer: nn.Module) -> Layer:
    if isinstance(layer, imported("transformers.pytorch_utils", "Conv1D")):
        return dense_linear(layer.weight.t(), layer.bias)
    if isinstance(layer, nn.Linear):
        return layer
    if isinstance(layer, PackedLinear) and layer.tiles is not None:
        return layer
    raise ValueError(f"{name}, a {type(layer).__name__}, has no feature-major form")


def _layer_scale(module: nn.Module) -> Tensor | None:
    return module.gamma.detach() if isinstance(module, LayerScale) else None
