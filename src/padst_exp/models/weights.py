"""Weights of timm's models: from the hub, or from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, load_pretrained, load_state_dict
from torch import Tensor, nn

from padst_exp.errors import require
from padst_exp.files import reading
from padst_exp.messages import say

BESIDE_PRETRAINED = "null beside model.pretrained=true"

Convert = Callable[..., dict[str, Tensor]]


def load(
    model: Any,
    *,
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    classifier: str,
    convert: Convert | None = None,
) -> nn.Module:
    """Give `model` the weights that are asked for, if any, and return it.

    Args:
        model: of timm, with `num_classes`.
        name: what timm calls its sizes, with or without a tag for the weights.
        pretrained: load the weights of `name` from the hub; they must have these sizes.
        checkpoint: load weights from this file of PyTorch or safetensors instead, or from a folder
            that timm wrote. Where it has no classifier, or one for another number of classes, the
            model keeps its fresh one, and a line says so.
        classifier: name of the last layer.
        convert: what timm does to a stored state before it loads it.

    Raises:
        UserError: unknown names, or unavailable weights.
    """
    if checkpoint is not None:
        require(not pretrained, "model.checkpoint", checkpoint, BESIDE_PRETRAINED)
        inside = [Path(checkpoint) / name for name in ("model.safetensors", "pytorch_model.bin")]
        checkpoint = str(next((path for path in inside if path.is_file()), checkpoint))
        require(Path(checkpoint).is_file(), "model.checkpoint", checkpoint, "an existing file")
    source_cfg = get_pretrained_cfg(name)
    known = not pretrained or source_cfg is not None
    require(known, "model.name", name, "a name that timm has weights for")
    key, source = ("pretrained", name) if pretrained else ("checkpoint", checkpoint)
    with reading(f"model.{key}", source, "weights to load"):
        if pretrained and source_cfg is not None:
            load_pretrained(
                model,
                pretrained_cfg=source_cfg.to_dict(),
                num_classes=model.num_classes,
                in_chans=model.in_chans,
                filter_fn=convert,
            )
        elif checkpoint is not None:
            state = load_state_dict(checkpoint, weights_only=True)
            state = state if convert is None else convert(state, model)
            _load_backbone(model, state, classifier, checkpoint)
    loaded: nn.Module = model
    return loaded


def _load_backbone(model: Any, state: dict[str, Tensor], classifier: str, checkpoint: str) -> None:
    fresh = {
        f"{classifier}.{k}": v for k, v in model.get_submodule(classifier).state_dict().items()
    }
    # What self-supervised training adds, of no use to a classifier (MAE).
    state = {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token"))}
    shapes = {key: state[key].shape for key in fresh if key in state}
    if shapes != {key: value.shape for key, value in fresh.items()}:
        had = "for another number of classes" if shapes else "missing"
        say(f"model.checkpoint: the classifier in {checkpoint} is {had}, it starts fresh")
        state |= fresh
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError("a weight is not finite")
    model.load_state_dict(state)
