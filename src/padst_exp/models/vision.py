"""Image classifiers over timm: targets of conf/model/*.yaml. They map `[B, C, H, W]` to logits."""

from typing import Any

import torch
from timm.models import (
    MlpMixer,
    VisionTransformer,
    create_model,
    get_pretrained_cfg_value,
    is_model,
    mlp_mixer,
    vision_transformer,
)
from torch import Tensor, nn

from padst_exp.errors import require
from padst_exp.files import reading
from padst_exp.models.sizes import require_depth, require_hidden, require_rate
from padst_exp.models.weights import BESIDE_PRETRAINED, load


def vit(
    *,
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    patch_size: int,
    dim: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    drop_path: float,
    layer_scale: float | None,
    image_size: int,
    channels: int,
    num_classes: int,
) -> nn.Module:
    """Vision transformer with a class token (Dosovitskiy et al. 2021).

    Args:
        name: what timm calls these sizes, with or without a tag for the weights.
        pretrained: load the weights of `name` from the hub; they must have these sizes.
        checkpoint: load weights from this file of PyTorch or safetensors instead; a head for
            another number of classes is left out.
        patch_size: of square patches; must divide `image_size`.
        dim: width of the residual stream, a multiple of `heads`.
        depth: number of blocks.
        heads: per attention.
        mlp_ratio: hidden width of the MLPs over `dim`.
        drop_path: rate of stochastic depth in the last block, rising linearly from zero.
        layer_scale: initial value of LayerScale, None for no LayerScale.
        image_size: height and width of the images.
        channels: of the images.
        num_classes: of the logits.

    Raises:
        UserError: sizes that do not fit each other, unknown names, or unavailable weights.
    """
    _require_divisor(patch_size, image_size)
    fits = dim >= 1 and heads >= 1 and dim % heads == 0
    require(fits, "model.heads", heads, f"a divisor of model.dim={dim}")
    require_depth(depth)
    require_hidden(dim, mlp_ratio)
    require_rate("drop_path", drop_path)
    model = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        drop_path_rate=drop_path,
        init_values=layer_scale,
    )
    return load(
        model,
        name=name,
        pretrained=pretrained,
        checkpoint=checkpoint,
        classifier="head",
        convert=vision_transformer.checkpoint_filter_fn,
    )


def mixer(
    *,
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    patch_size: int,
    dim: int,
    depth: int,
    mlp_ratio: tuple[float, float],
    drop_path: float,
    image_size: int,
    channels: int,
    num_classes: int,
) -> nn.Module:
    """MLP-Mixer (Tolstikhin et al. 2021).

    Args:
        name: as in `vit`, like all others not named here.
        dim: channels of a token.
        mlp_ratio: hidden widths of token and channel mixing, both over `dim`.
        drop_path: rate of stochastic depth in all blocks.

    Raises:
        UserError: sizes that do not fit each other, unknown names, or unavailable weights.
    """
    _require_divisor(patch_size, image_size)
    require_depth(depth)
    for ratio in mlp_ratio:
        require_hidden(dim, ratio)
    require_rate("drop_path", drop_path)
    model = MlpMixer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=dim,
        num_blocks=depth,
        mlp_ratio=mlp_ratio,
        drop_path_rate=drop_path,
    )
    return load(
        model,
        name=name,
        pretrained=pretrained,
        checkpoint=checkpoint,
        classifier="head",
        convert=mlp_mixer.checkpoint_filter_fn,
    )


def by_name(
    *,
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    drop_path: float,
    image_size: int,
    channels: int,
    num_classes: int,
) -> nn.Module:
    """Any classifier that timm makes under a name.

    Args:
        name: of `timm.list_models()`, with or without a tag for the weights.
        pretrained, checkpoint: as in `vit`; a classifier for another number of classes starts
            fresh.
        drop_path: rate of stochastic depth, where the model has it; else 0.

    Raises:
        UserError: an unknown name, unavailable weights, or images that the model cannot take.
    """
    architecture, given = name.partition(".")[0], checkpoint is not None
    require(is_model(architecture), "model.name", name, "a name of timm.list_models()")
    require(not (given and pretrained), "model.checkpoint", checkpoint, BESIDE_PRETRAINED)
    require_rate("drop_path", drop_path)
    sizes: dict[str, Any] = {"in_chans": channels, "num_classes": num_classes}
    if drop_path:
        sizes["drop_path_rate"] = drop_path
    wanted = f"a model for {channels} x {image_size} x {image_size} images, and its weights"
    with reading("model.name", name, wanted):
        if get_pretrained_cfg_value(architecture, "fixed_input_size"):
            sizes["img_size"] = image_size
        with torch.device("meta"), torch.no_grad():
            images = torch.empty(2, channels, image_size, image_size)
            logits = create_model(name, **sizes)(images)
        if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
            raise TypeError("it does not map them to logits")
        model: Any = create_model(name, pretrained=pretrained, **sizes)
        classifier = model.pretrained_cfg["classifier"]
    return load(
        model,
        name=name,
        pretrained=False,
        checkpoint=checkpoint,
        classifier=classifier if isinstance(classifier, str) else classifier[0],
    )


def _require_divisor(patch_size: int, image_size: int) -> None:
    fits = patch_size >= 1 and image_size % patch_size == 0
    require(fits, "model.patch_size", patch_size, f"a divisor of the image size {image_size}")
