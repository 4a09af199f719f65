"""Image classifiers over timm: targets of conf/model/*.yaml. They map `[B, C, H, W]` to logits."""

from collections.abc import Sequence

from timm.models import MlpMixer, VisionTransformer, mlp_mixer, vision_transformer
from torch import nn

from padst_exp.errors import UserError
from padst_exp.models.weights import load


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
    if dim < 1 or heads < 1 or dim % heads:
        raise UserError(f"model.heads: expected a divisor of dim={dim}, got {heads}")
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
    mlp_ratio: Sequence[float],
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
    if len(mlp_ratio) != 2:
        raise UserError(
            f"model.mlp_ratio: expected two numbers, of token and channel mixing, "
            f"got {list(mlp_ratio)}"
        )
    model = MlpMixer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=channels,
        num_classes=num_classes,
        embed_dim=dim,
        num_blocks=depth,
        mlp_ratio=(mlp_ratio[0], mlp_ratio[1]),
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


def _require_divisor(patch_size: int, image_size: int) -> None:
    if patch_size < 1 or image_size % patch_size:
        raise UserError(
            f"model.patch_size: expected a divisor of the image size {image_size}, got {patch_size}"
        )
