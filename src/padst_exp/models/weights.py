"""Weights of timm's models: from the hub, or from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, load_pretrained, load_state_dict
from torch import Tensor, nn

from padst_exp.errors import UserError, require

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
        checkpoint: load weights from this file of PyTorch or safetensors instead; a classifier for
            another number of classes is left out.
        classifier: name of the last layer.
        convert: what timm does to a stored state before it loads it.

    Raises:
        UserError: unknown names, or unavailable weights.
    """
    if checkpoint is not None:
        require(not pretrained, "model.checkpoint", checkpoint, "null beside model.pretrained=true")
        require(Path(checkpoint).is_file(), "model.checkpoint", checkpoint, "an existing file")
    source_cfg = get_pretrained_cfg(name)
    known = not pretrained or source_cfg is not None
    require(known, "model.name", name, "a name that timm has weights for")
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
            state = load_state_dict(checkpoint)
            state = state if convert is None else convert(state, model)
            head = model.get_submodule(classifier)
            if state[f"{classifier}.bias"].shape != head.bias.shape:
                state.update({f"{classifier}.{k}": v for k, v in head.state_dict().items()})
            model.load_state_dict(state)
    except (OSError, RuntimeError, KeyError) as error:
        key, source = ("pretrained", name) if pretrained else ("checkpoint", checkpoint)
        found = f"{source} ({' '.join(str(error).split())[:200]})"
        raise UserError(f"model.{key}: expected weights to load, got {found}") from error
    loaded: nn.Module = model
    return loaded
