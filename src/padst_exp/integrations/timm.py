"""Dense exports in timm's own layout, for `create_model("local-dir:<folder>", pretrained=True)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf
from timm.models import create_model, get_pretrained_cfg_value
from timm.models._hub import save_config_for_hf
from torch import nn

from padst_exp.data.task import Classification
from padst_exp.errors import UserError
from padst_exp.files import reason
from padst_exp.integrations.model_card import DENSE, model_card, require_no_transform
from padst_exp.restore import RestoredRun, plain_model

# What timm's constructors call the keys of ours that they have. What is not in here, timm's model
# of that name has as ours has it, or it is another model.
_ANY = {"channels": "in_chans", "num_classes": "num_classes"}
ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "padst_exp.models.vision.by_name": _ANY,
    "padst_exp.models.vision.vit": {
        **_ANY,
        "patch_size": "patch_size",
        "dim": "embed_dim",
        "depth": "depth",
        "heads": "num_heads",
        "mlp_ratio": "mlp_ratio",
        "layer_scale": "init_values",
    },
    "padst_exp.models.vision.mixer": {**_ANY, "mlp_ratio": "mlp_ratio"},
    "padst_exp.models.convnets.resnet": {**_ANY, "depths": "layers"},
    "padst_exp.models.convnets.mobilenet_v2": _ANY,
}
# What timm says of its own weights, and not of these.
_OF_OTHERS = (
    "tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes",
    "label_offset", "label_names", "label_descriptions", "test_input_size", "test_crop_pct",
)  # fmt: skip
PROGRAM = """import timm

model = timm.create_model("local-dir:<this folder>", pretrained=True)"""


def timm_model(restored: RestoredRun) -> nn.Module:
    """The dense model of a run as timm itself makes it, with fresh weights.

    Raises:
        UserError: timm has no such model.
    """
    require_no_transform(restored, "timm")
    config, task = restored.config.model, restored.task
    if config._target_ not in ARGUMENTS or not isinstance(task, Classification):
        raise not_of_timm(config._target_)
    architecture, arguments = _call(restored)
    shape = task.model_shape
    described = {
        **dict.fromkeys(_OF_OTHERS),
        "custom_load": False,
        "input_size": (shape["channels"], shape["image_size"], shape["image_size"]),
        **task.preprocessing,
    }
    try:
        model: nn.Module = create_model(architecture, pretrained_cfg_overlay=described, **arguments)
        model.load_state_dict(plain_model(restored.config, task).state_dict())
    except Exception as error:  # constructors fail in any way when called with anything
        raise not_of_timm(f"{architecture} with these sizes", reason(error)) from error
    return model


def timm_files(
    restored: RestoredRun, model: nn.Module, metrics: Mapping[str, float]
) -> dict[str, str]:
    """The text of each file beside the tensors, by name.

    Args:
        restored: a classifier, packed.
        model: what `timm_model` made of it.
        metrics: of the checkpoint, by name.
    """
    architecture, arguments = _call(restored)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(model, str(path), model_args=arguments)
        text = path.read_text("utf-8")
    card = model_card(
        restored,
        metrics,
        architecture=architecture,
        library="timm",
        task="image-classification",
        storage=DENSE,
        program=PROGRAM,
    )
    return {"config.json": text, "README.md": card}


def not_of_timm(what: str, why: str = "timm has no such model") -> UserError:
    """The refusal of a model that timm cannot make."""
    return UserError(f"format: expected packed or dense for {what} ({why}), got timm")


def _call(restored: RestoredRun) -> tuple[str, dict[str, Any]]:
    """The name of the model in timm, and what it is to be called with."""
    config: Any = OmegaConf.to_container(restored.config.model, resolve=True)
    keys = {**config, **restored.task.model_shape}
    architecture = config["name"].partition(".")[0]
    given = {theirs: keys[ours] for ours, theirs in ARGUMENTS[config["_target_"]].items()}
    arguments = {name: value for name, value in given.items() if value is not None}
    if get_pretrained_cfg_value(architecture, "fixed_input_size"):
        arguments["img_size"] = keys["image_size"]
    return architecture, arguments
