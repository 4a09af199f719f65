"""What is measured, read from conf/: structures, layers and models.

An entry is an option of the group `structure` or `model`, by its name (`vit`) or with some of its
keys (`{structure: nm, group: 64}`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from padst_exp.config import build, closest, config_dir, resolve_target
from padst_exp.errors import UserError
from padst_exp.permutations import PermutationLearner
from padst_exp.sparsify import Rule
from padst_exp.structures import Structure
from padst_exp.targets import keyword_parameters

Entry = str | Mapping[str, Any]

# Options of the group `permutation` by the state that its permutations are in.
LEARNERS = {"none": "none", "hard": "random", "soft": "doubly_stochastic"}


def _entry(group: str, entry: Entry) -> tuple[DictConfig, dict[str, Any], str]:
    """The file of an entry, its keys, and a label of both."""
    keys: dict[str, Any] = {group: entry} if isinstance(entry, str) else dict(entry)
    option = str(keys.pop(group, ""))
    path = config_dir() / group / f"{option}.yaml"
    if not path.is_file():
        known = [file.stem for file in path.parent.glob("*.yaml")]
        raise UserError(f"{group}s: {option!r} is unknown{closest(option, known)}")
    words = [option, *(f"{key}={value}" for key, value in keys.items() if key != "permutation")]
    return cast(DictConfig, OmegaConf.load(path)), keys, " ".join(words)


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
    return Sparsity(label, build(_merged(file, keys), "structures"), phases)


def _merged(*nodes: Mapping[Any, Any]) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(*nodes))


@dataclass(frozen=True)
class Layer:
    """A linear layer that fuses `split` projections on its output."""

    in_features: int
    out_features: int
    split: int = 1

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{self.in_features}->{self.out_features}"

    def build(self) -> nn.Module:
        """The dense layer, as the only one of a model."""
        return nn.Sequential(nn.Linear(self.in_features, self.out_features, bias=False))

    def rules(self, scope: str) -> list[Rule]:
        """What is sparse."""
        return [Rule("0", self.split)] if scope else []


def layers(names: Sequence[str]) -> list[Layer]:
    """Layers by outputs x inputs, or all four of a transformer by its width; each once.

    Raises:
        UserError: a name is neither.
    """
    found: list[Layer] = []
    for name in names:
        match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", name)
        if match is None:
            raise UserError(f"shapes: expected a width (768) or a layer (3072x768), got {name!r}")
        first, second = int(match[1]), match[2]
        if second is None:
            found += [Layer(first, 4 * first), Layer(4 * first, first), Layer(first, first)]
        found.append(Layer(int(second), first) if second else Layer(first, 3 * first, split=3))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Model:
    """A whole model."""

    label: str  # its name in tables
    node: DictConfig  # the key `model` of its file
    block_linears: tuple[Rule, ...]  # those that fuse projections (QKV) have a split
    inputs: Mapping[str, int]  # what its constructor needs to know of the data

    @property
    def is_language(self) -> bool:
        """Whether it maps tokens to logits of the next ones."""
        return "context_length" in self.inputs

    def build(self) -> nn.Module:
        """The dense model, from seed 0."""
        torch.manual_seed(0)
        return build(self.node, "model", self.inputs)

    def shallow(self) -> Model:
        """The same with one block."""
        node = _merged(self.node, {"depth": 1})
        return Model(self.label, node, self.block_linears, self.inputs)

    def rules(self, scope: str) -> list[Rule]:
        """What is sparse: "all" block linears, those but QKV ("dense_qkv"), or nothing ("")."""
        return [r for r in self.block_linears if scope == "all" or (scope and r.split == 1)]

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
    node = _merged(file.model, dropout, keys)
    language = "vocab_size" in keyword_parameters(resolve_target(node, "models"))
    rules = tuple(Rule(rule.pattern, rule.split) for rule in file.sparse)
    return Model(label, node, rules, text if language else images)
