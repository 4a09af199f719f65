"""Convolutional networks over timm: targets of conf/model/*.yaml. `[B, C, H, W]` to logits."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from timm.models._efficientnet_builder import (
    decode_arch_def,
    resolve_act_layer,
    resolve_bn_args,
    round_channels,
)
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_conv
from torch import nn

from padst_exp.errors import require
from padst_exp.models.sizes import DEEPEST, WIDEST, require_rate
from padst_exp.models.weights import load

Stem = Literal["imagenet", "cifar"]


def resnet(
    *,
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    block: Literal["basic", "bottleneck"],
    depths: tuple[int, int, int, int],
    width: float,
    stem: Stem,
    drop_path: float,
    zero_init_last: bool,
    image_size: int,
    channels: int,
    num_classes: int,
) -> nn.Module:
    """ResNet (He et al. 2016).

    Args:
        name: what timm calls these sizes, with or without a tag for the weights.
        pretrained: load the weights of `name` from the hub; they must have these sizes.
        checkpoint: load weights from this file of PyTorch or safetensors instead; a classifier for
            another number of classes is left out.
        block: two 3x3 convolutions, or 1x1, 3x3 and 1x1.
        depths: blocks of the stages.
        width: factor of all channels but those of images and classes; 1: 64 in the first stage.
        stem: "imagenet": 7x7 with stride 2, then pooling; "cifar": 3x3 with stride 1, for images
            of 32 pixels or fewer.
        drop_path: rate of stochastic depth in the last block, rising linearly from zero.
        zero_init_last: whether the last norm of each block starts at zero, so that blocks start as
            identities.
        image_size: height and width of the images.
        channels: of the images.
        num_classes: of the logits.

    Raises:
        UserError: sizes that do not fit each other, unknown names, or unavailable weights.
    """
    base = _width(width)
    wanted = f"at least one block in each stage, and at most {DEEPEST} in all"
    fits = min(depths) > 0 and sum(depths) <= DEEPEST
    require(fits, "model.depths", list(depths), wanted)
    require_rate("drop_path", drop_path)
    _require_size(image_size, stem)
    kind: Any = BasicBlock if block == "basic" else Bottleneck
    model: Any = ResNet(
        block=kind,
        layers=depths,
        channels=tuple(base << stage for stage in range(4)),
        in_chans=channels,
        num_classes=num_classes,
        drop_path_rate=drop_path,
        zero_init_last=zero_init_last,
    )
    if base != 64:
        _set_stem_width(model, base)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(channels, base, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    if base != 64 or stem == "cifar":
        model.init_weights(zero_init_last)
    return load(model, name=name, pretrained=pretrained, checkpoint=checkpoint, classifier="fc")


def mobilenet_v2(
    *,
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    width: float,
    stem: Stem,
    drop_path: float,
    image_size: int,
    channels: int,
    num_classes: int,
) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018).

    Args:
        name: as in `resnet`, like all others not named here.
        width: factor of all channels, which are then rounded to multiples of 8.
        stem: "cifar": stem and second stage have stride 1 instead of 2.

    Raises:
        UserError: sizes that do not fit each other, unknown names, or unavailable weights.
    """
    _width(width)
    require_rate("drop_path", drop_path)
    _require_size(image_size, stem)
    second = 2 if stem == "imagenet" else 1
    blocks = [
        ["ds_r1_k3_s1_c16"],
        [f"ir_r2_k3_s{second}_e6_c24"],
        ["ir_r3_k3_s2_e6_c32"],
        ["ir_r4_k3_s2_e6_c64"],
        ["ir_r3_k3_s1_e6_c96"],
        ["ir_r3_k3_s2_e6_c160"],
        ["ir_r1_k3_s1_e6_c320"],
    ]
    rounded = partial(round_channels, multiplier=width)
    model = EfficientNet(
        block_args=decode_arch_def(blocks),
        num_features=max(1280, rounded(1280)),
        stem_size=32,
        round_chs_fn=rounded,
        act_layer=resolve_act_layer({}, "relu6"),
        norm_layer=partial(nn.BatchNorm2d, **resolve_bn_args({})),
        in_chans=channels,
        num_classes=num_classes,
        drop_path_rate=drop_path,
    )
    if stem == "cifar":
        model.conv_stem.stride = (1, 1)
    return load(
        model, name=name, pretrained=pretrained, checkpoint=checkpoint, classifier="classifier"
    )


def _set_stem_width(model: Any, base: int) -> None:
    """Give the stem `base` channels; timm's has 64 whatever the stages have."""
    stem, first = model.conv1, model.layer1[0]
    model.conv1 = nn.Conv2d(
        stem.in_channels, base, stem.kernel_size, stem.stride, stem.padding, bias=False
    )
    model.bn1 = nn.BatchNorm2d(base)
    inside = first.conv1
    first.conv1 = nn.Conv2d(
        base, inside.out_channels, inside.kernel_size, padding=inside.padding, bias=False
    )
    if first.expansion > 1:
        first.downsample = downsample_conv(base, 4 * base, kernel_size=1)
    else:
        first.downsample = None


def _width(width: float) -> int:
    """Channels of the first stage of a ResNet."""
    # 64 * sqrt(4) is a little less than 128.
    base = int(64 * width + 1e-9)
    require(1 <= base <= WIDEST, "model.width", width, "a factor that leaves a channel")
    return base


def _require_size(image_size: int, stem: Stem) -> None:
    """Refuse images that would be pooled to less than a pixel."""
    reduction = 32 if stem == "imagenet" else 8
    fits = image_size >= reduction
    require(fits, "model.stem", stem, f"cifar for images of {image_size} pixels, at least 8")
