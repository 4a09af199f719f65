"""What is measured, read from conf/: structures, layers and models.

An entry is an option of the group `structure` or `model`, by its name (`vit`) or with some of its
keys (`{structure: nm, group: 64}`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from padst_exp.bench.keys import Shape
from padst_exp.config import build, closest, config_dir, keyword_parameters, options, resolve_target
from padst_exp.errors import UserError
from padst_exp.permutations import PermutationLearner
from padst_exp.sparsify import Rule
from padst_exp.structures import Structure

Entry = str | Mapping[str, Any]

# Options of the group `permutation` by the state that its permutations are in.
LEARNERS = {"none": "none", "hard": "random", "soft": "doubly_stochastic"}


def _entry(group: str, entry: Entry) -> tuple[DictConfig, dict[str, Any], str]:
    """The file of an entry, its keys, and a label of both."""
    keys: dict[str, Any] = {group: entry} if isinstance(entry, str) else dict(entry)
    option = str(keys.pop(group, ""))
    if option not in options(group):
        raise UserError(f"{group}s: {option!r} is unknown{closest(option, options(group))}")
    file = cast(DictConfig, OmegaConf.load(config_dir() / group / f"{option}.yaml"))
    words = [option, *(f"{key}={value}" for key, value in keys.items() if key != "permutation")]
    return file, keys, " ".join(words)


def learner(permutation: str) -> PermutationLearner:
    """The learner whose permutations are "none", "hard" or "soft"."""
    return build(_entry("permutation", LEARNERS[permutation])[0], "permutation")


@dataclass(frozen=True)
class Sparsity:
    """A structure with its label in tables, and `phases`, keys of LEARNERS: how its permutations
    end, and how they start."""

    label: str
    structure: Structure
    phases: tuple[str, ...]


def sparsity(entry: Entry) -> Sparsity:
    """The structure of an entry, whose `permutation: none` says that models learn none.

    Raises:
        UserError: no such option or key.
    """
    file, keys, label = _entry("structure", entry)
    phases = ("none",) if keys.pop("permutation", "") == "none" else ("hard", "soft")
    return Sparsity(label, build(merged(file, keys), "structures"), phases)


def merged(*nodes: Mapping[Any, Any]) -> DictConfig:
    """Nodes of a configuration, of which later ones win."""
    return cast(DictConfig, OmegaConf.merge(*nodes))


@dataclass(frozen=True)
class Layer:
    """A dense layer of some shape, as the only one of a model."""

    shape: Shape

    def build(self) -> nn.Module:
        """The dense layer, without a bias."""
        shape, kernel = self.shape, self.shape.kernel
        if not kernel:
            return nn.Sequential(nn.Linear(shape.inputs, shape.outputs, bias=False))
        padding = kernel // 2
        return nn.Sequential(
            nn.Conv2d(shape.inputs, shape.outputs, kernel, padding=padding, bias=False)
        )

    def rules(self, scope: str) -> list[Rule]:
        """What is sparse."""
        return [Rule("0", self.shape.split)] if scope else []

    def example(self, tokens: int) -> Tensor:
        """Random inputs on the CPU: so many tokens, or images of a convolution."""
        shape = self.shape
        images = (shape.inputs, shape.pixels, shape.pixels) if shape.kernel else (shape.inputs,)
        return torch.randn(tokens, *images)

    def operations(self, tokens: int) -> int:
        """Of a dense forward pass."""
        return 2 * tokens * self.shape.pixels**2 * self.weights

    @property
    def weights(self) -> int:
        """How many there are when it is dense."""
        return self.shape.inputs * self.shape.outputs * max(1, self.shape.kernel) ** 2


@dataclass(frozen=True)
class Model:
    """A whole model."""

    label: str  # its name in tables
    node: DictConfig  # the key `model` of its file
    linears: tuple[Rule, ...]  # what can be sparse; those that fuse projections (QKV) have a split
    inputs: Mapping[str, int]  # what its constructor needs to know of the data

    @property
    def is_language(self) -> bool:
        """Whether it maps tokens to logits of the next ones."""
        return "context_length" in self.inputs

    def build(self) -> nn.Module:
        """The dense model, from seed 0."""
        torch.manual_seed(0)
        return build(self.node, "model", self.inputs)

    def rules(self, scope: str) -> list[Rule]:
        """What is sparse: "all" that can be, that but QKV ("dense_qkv"), or nothing ("")."""
        return [r for r in self.linears if scope == "all" or (scope and r.split == 1)]

    def example(self, batch: int) -> tuple[Tensor, Tensor]:
        """Random inputs and targets on the CPU, from seed 0."""
        generator, size = torch.Generator().manual_seed(0), self.inputs
        if self.is_language:
            tokens = (batch, size["context_length"] + 1)
            text = torch.randint(size["vocab_size"], tokens, generator=generator)
            return text[:, :-1], text[:, 1:]
        pixels = (batch, size["channels"], size["image_size"], size["image_size"])
        images = torch.randn(pixels, generator=generator)
        return images, torch.randint(size["num_classes"], (batch,), generator=generator)


def model(entry: Entry, images: Mapping[str, int], text: Mapping[str, int]) -> Model:
    """The model of an entry, for inputs of its kind, without dropout: it slows attention down.

    Raises:
        UserError: no such option.
    """
    file, keys, label = _entry("model", entry)
    dropout = {"dropout": 0.0} if "dropout" in file.model else {}
    node = merged(file.model, dropout, keys)
    language = "vocab_size" in keyword_parameters(resolve_target(node, "models"))
    rules = tuple(Rule(rule.pattern, rule.split) for rule in file.sparse)
    return Model(label, node, rules, text if language else images)
