"""Image classifiers over timm: targets of conf/model/*.yaml. They map `[B, C, H, W]` to logits."""

from collections.abc import Callable, Sequence
from pathlib import Path

from timm.models import (
    MlpMixer,
    VisionTransformer,
    get_pretrained_cfg,
    load_pretrained,
    load_state_dict,
    mlp_mixer,
    vision_transformer,
)
from torch import Tensor, nn

from padst_exp.errors import UserError


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
    return _load(model, vision_transformer.checkpoint_filter_fn, name, pretrained, checkpoint)


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
    return _load(model, mlp_mixer.checkpoint_filter_fn, name, pretrained, checkpoint)


def _require_divisor(patch_size: int, image_size: int) -> None:
    if patch_size < 1 or image_size % patch_size:
        raise UserError(
            f"model.patch_size: expected a divisor of the image size {image_size}, got {patch_size}"
        )


def _load(
    model: VisionTransformer | MlpMixer,
    convert: Callable[..., dict[str, Tensor]],
    name: str,
    pretrained: bool,
    checkpoint: str | None,
) -> nn.Module:
    if pretrained and checkpoint is not None:
        raise UserError("model.checkpoint: set either this or model.pretrained")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise UserError(f"model.checkpoint: no file {checkpoint}")
    source_cfg = get_pretrained_cfg(name)
    if pretrained and source_cfg is None:
        raise UserError(f"model.name: timm has no weights called {name!r}")
    try:
        if pretrained and source_cfg is not None:
            load_pretrained(
                model,
                pretrained_cfg=source_cfg.to_dict(),
                num_classes=model.num_classes,
                in_chans=model.in_chans,
                filter_fn=convert,
            )
        elif checkpoint is not None:
            state = convert(load_state_dict(checkpoint), model)
            if state["head.bias"].shape != model.head.bias.shape:
                state.update({f"head.{k}": v for k, v in model.head.state_dict().items()})
            model.load_state_dict(state)
    except (OSError, RuntimeError, KeyError) as error:
        source = f"pretrained: {name}" if pretrained else f"checkpoint: {checkpoint}"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.{source} cannot be loaded ({reason})") from error
    return model
