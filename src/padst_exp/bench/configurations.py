"""What is measured: structures, shapes of layers, models, by the names that a user types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from padst_exp.config import build, closest, config_dir
from padst_exp.errors import UserError
from padst_exp.sparsify import Rule
from padst_exp.structures import NM, Block, Diagonal, Structure, Unstructured

LAYER_STRUCTURES = (
    "nm-64", "nm-32", "nm-16", "nm-1", "block-64", "block-32", "block-16", "diag-stride-32",
    "diag-1", "unstructured",
)  # fmt: skip
MODEL_STRUCTURES = ("nm-64", "nm-16", "block-32")


def structure(name: str) -> Structure:
    """The structure called `name`: `nm-64`, `block-32`, `diag-stride-32`, `diag-band-16`, ...

    Raises:
        UserError: there is none.
    """
    kind, _, number = name.rpartition("-")
    if re.fullmatch(r"[1-9]\d*", number):
        size = int(number)
        if kind == "nm":
            return NM(n=1, m=None, group=size)
        if kind == "block":
            return Block(size=size, balanced=False)
        if kind == "diag-stride":
            return Diagonal(bundle="stride", stride=size, width=1)
        if kind == "diag-band":
            return Diagonal(bundle="band", stride=1, width=size)
        if (kind, size) == ("diag", 1):
            return Diagonal(bundle=1, stride=1, width=1)
    if name == "unstructured":
        return Unstructured()
    raise UserError(
        f"structures: {name!r} is unknown; expected nm-64, block-64, diag-stride-32, diag-band-16 "
        "(with any number), diag-1 or unstructured"
    )


def describe(structure: Structure) -> str:
    """A structure as tables name it, with all that accuracy and speed depend on."""
    match structure:
        case NM(n=1):
            return f"nm group={structure.group}"
        case Block():
            return f"block size={structure.size}"
        case Diagonal(bundle="stride"):
            return f"diag stride={structure.stride}"
        case Diagonal(bundle="band"):
            return f"diag band={structure.width}"
        case Diagonal():
            return "diag bundle=1"
    return type(structure).__name__.lower()


@dataclass(frozen=True)
class Shape:
    """A linear layer. `split`: how many projections it fuses on its output."""

    in_features: int
    out_features: int
    split: int = 1

    def __str__(self) -> str:
        return f"{self.in_features}->{self.out_features}"


def _transformer(width: int) -> list[Shape]:
    return [
        Shape(width, 4 * width),
        Shape(4 * width, width),
        Shape(width, width),
        Shape(width, 3 * width, split=3),
    ]


SHAPES = {
    "vit_b": _transformer(768),
    "vit_l": _transformer(1024),
    "gpt2": _transformer(768),
    "gpt2_medium": _transformer(1024),
    "gpt2_xl": _transformer(1600),
}


def shapes(names: Sequence[str]) -> list[Shape]:
    """The layers that `names` stand for: those of a model, or one as outputs x inputs. Each once.

    Raises:
        UserError: one is neither.
    """
    found: list[Shape] = []
    for name in names:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if match:
            found.append(Shape(int(match[2]), int(match[1])))
        elif name in SHAPES:
            found += SHAPES[name]
        else:
            raise UserError(
                f"shapes: {name!r} is unknown, expected 3072x768{closest(name, SHAPES)}"
            )
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Model:
    """A whole model.

    Args:
        option: its file in conf/model/.
        name: in tables.
        inputs: what its constructor is told of the data.
        sizes: of its file, replaced (for tests).
    """

    option: str
    name: str
    inputs: dict[str, int]
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def is_language(self) -> bool:
        """Whether it maps tokens to logits of the next ones."""
        return "context_length" in self.inputs

    def config(self) -> DictConfig:
        """Its file, without dropout: it would slow attention down, on both sides."""
        cfg = OmegaConf.load(config_dir() / "model" / f"{self.option}.yaml")
        assert isinstance(cfg, DictConfig)
        for key, value in self.sizes.items():
            cfg.model[key] = value
        if "dropout" in cfg.model:
            cfg.model.dropout = 0.0
        return cfg

    def build(self) -> nn.Module:
        """The dense model, from seed 0."""
        torch.manual_seed(0)
        return build(self.config().model, "model", self.inputs)

    def rules(self, scope: str) -> list[Rule]:
        """Which layers are sparse: "all" block linears, or without fused projections (QKV)."""
        rules = [Rule(rule.pattern, rule.split) for rule in self.config().sparse]
        return [rule for rule in rules if scope == "all" or rule.split == 1]

    def example(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random inputs and targets, on the CPU."""
        size: Any = self.inputs
        if self.is_language:
            tokens = (batch, size["context_length"] + 1)
            text = torch.randint(size["vocab_size"], tokens, generator=generator)
            return text[:, :-1], text[:, 1:]
        pixels = (batch, size["channels"], size["image_size"], size["image_size"])
        images = torch.randn(pixels, generator=generator)
        return images, torch.randint(size["num_classes"], (batch,), generator=generator)


IMAGENET = {"image_size": 224, "channels": 3, "num_classes": 1000}
TEXT = {"vocab_size": 50257, "context_length": 1024}
MODELS = {
    "vit": Model("vit", "ViT-B/16", IMAGENET),
    "vit_large": Model("vit_large", "ViT-L/16", IMAGENET),
    "gpt2": Model("gpt2", "GPT-2 small", TEXT),
    "gpt2_medium": Model("gpt2_medium", "GPT-2 medium", TEXT),
}


def models(names: Sequence[str]) -> list[Model]:
    """The models that `names` stand for.

    Raises:
        UserError: one is unknown.
    """
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise UserError(f"models: {unknown[0]!r} is unknown{closest(unknown[0], MODELS)}")
    return [MODELS[name] for name in names]
