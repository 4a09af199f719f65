"""What is measured, read from conf/: the keys of a run, structures, layers and models.

An entry is an option of the group `structure` or `model`, by its name (`vit`) or with some of its
keys (`{structure: nm, group: 64}`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import with_config
from torch import Tensor, nn

from padst_exp.bench.session import Ceilings
from padst_exp.config import (
    Device,
    build,
    closest,
    config_dir,
    options,
    read_keys,
    require_sparsity,
    resolve_target,
)
from padst_exp.errors import UserError, require
from padst_exp.memory import fitting, require_memory
from padst_exp.permutations import PermutationLearner
from padst_exp.sparsify import Rule
from padst_exp.structures import Structure
from padst_exp.targets import keyword_parameters

MOST_THREADS = 1024

Entry = str | Mapping[str, Any]

# Keys that ask about one layer, see `payoff`.
QUESTION = ("shape", "structure", "sparsity")

# Options of the group `permutation` by the state that its permutations are in.
LEARNERS = {"none": "none", "hard": "random", "soft": "doubly_stochastic"}


def _entry(group: str, entry: Entry) -> tuple[DictConfig, dict[str, Any], str]:
    """The file of an entry, its keys, and a label of both."""
    keys: dict[str, Any] = {group: entry} if isinstance(entry, str) else dict(entry)
    option = str(keys.pop(group, ""))
    if option not in options(group):
        raise UserError(f"{group}s: {option!r} is unknown{closest(option, options(group))}")
    file = cast(DictConfig, OmegaConf.load(config_dir() / group / f"{option}.yaml"))
    words = [option, *(f"{key}={value}" for key, value in keys.items() if key != "permutations")]
    return file, keys, " ".join(words)


@dataclass(frozen=True)
class Sparsity:
    """A structure with its label in tables, and the state of permutations: a key of LEARNERS."""

    label: str
    structure: Structure
    permutation: str

    def learner(self) -> PermutationLearner:
        """Whose permutations are in that state."""
        return build(_entry("permutation", LEARNERS[self.permutation])[0], "permutation")


def sparsities(entry: Entry) -> list[Sparsity]:
    """The structure of an entry, in each of its `permutations`: "hard" ones, if nothing else.

    Raises:
        UserError: no such option or key.
    """
    file, keys, label = _entry("structure", entry)
    states = keys.pop("permutations", ["hard"])
    require(set(states) <= set(LEARNERS), "structures.permutations", states, str(list(LEARNERS)))
    structure = build(_merged(file, keys), "structures")
    return [Sparsity(label, structure, state) for state in states]


def _merged(*nodes: Mapping[Any, Any]) -> DictConfig:
    return cast(DictConfig, OmegaConf.merge(*nodes))


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer, or a convolution of square images that keeps their size.

    Args:
        inputs, outputs: features, or channels.
        split: projections that a linear layer fuses on its output, 3 for Q, K and V.
        kernel: width of a convolution's kernel, odd; 0 for a linear layer.
        pixels: width of the images of a convolution.
    """

    inputs: int
    outputs: int
    split: int = 1
    kernel: int = 0
    pixels: int = 1

    @property
    def label(self) -> str:
        """Its name in tables."""
        window = f", {self.kernel}x{self.kernel} on {self.pixels} pixels" if self.kernel else ""
        return f"{self.inputs}->{self.outputs}{window}"

    def build(self) -> nn.Module:
        """The dense layer without a bias, as the only one of a model."""
        sizes, kernel = (self.inputs, self.outputs), self.kernel
        if not kernel:
            return nn.Sequential(nn.Linear(*sizes, bias=False))
        return nn.Sequential(nn.Conv2d(*sizes, kernel, padding=kernel // 2, bias=False))

    def rules(self, scope: str) -> list[Rule]:
        """What is sparse."""
        return [Rule("0", self.split)] if scope else []

    def example(self, tokens: int) -> Tensor:
        """Random inputs on the CPU: so many tokens, or images of a convolution."""
        images = (self.pixels, self.pixels) if self.kernel else ()
        return torch.randn(tokens, self.inputs, *images)

    def least_seconds(self, ceilings: Ceilings, tokens: int, dtype: torch.dtype) -> float:
        """Of a dense forward pass whose weights come from beyond the cache."""
        weights = self.inputs * self.outputs * max(1, self.kernel) ** 2
        operations = 2 * tokens * self.pixels**2 * weights
        return ceilings.least_seconds(operations, weights * dtype.itemsize)


@dataclass(frozen=True)
class Model:
    """A whole model."""

    label: str  # its name in tables
    node: DictConfig  # the key `model` of its file
    sparse: tuple[Rule, ...]  # what can be; those that fuse projections (QKV) have a split
    inputs: Mapping[str, int]  # what its constructor needs to know of the data

    def build(self) -> nn.Module:
        """The dense model, from seed 0."""
        torch.manual_seed(0)
        with fitting("models"):
            return build(self.node, "model", self.inputs)

    def rules(self, scope: str) -> list[Rule]:
        """What is sparse: "all" that can be, that but QKV ("dense_qkv"), or nothing ("")."""
        return [r for r in self.sparse if scope == "all" or (scope and r.split == 1)]

    def example(self, batch: int) -> tuple[Tensor, Tensor]:
        """Random inputs and targets on the CPU, from seed 0."""
        generator, size = torch.Generator().manual_seed(0), self.inputs
        if "context_length" in size:
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
    size = text["context_length"] if language else images["image_size"]
    label += f", context {size}" if language else f", {size} pixels"
    return Model(label, node, rules, text if language else images)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What one suite measures; conf/bench.yaml says what each key is."""

    suite: str
    measure: Literal["layers", "inference", "training", "memory"]
    device: Device
    dtype: Literal["float32", "bfloat16", "float16"] | None
    threads: int
    rounds: int
    clock: Literal["wall", "cpu"]
    out: str
    sparsities: list[float]
    structures: list[str | dict[str, Any]]
    shapes: list[Layer] | None
    tokens: list[int] | None
    models: list[str | dict[str, Any]] | None
    batches: list[int] | None
    scopes: list[Literal["all", "dense_qkv"]] | None
    images: dict[str, int] | None
    text: dict[str, int] | None

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            require_sparsity("sparsities", sparsity)
        for key in ("threads", "rounds", "tokens", "batches"):
            value = getattr(self, key)
            for count in value if isinstance(value, list) else [value]:
                require(count is None or count >= 1, key, count, "at least 1")
        for layer in self.shapes or ():
            least = min(layer.inputs, layer.outputs, layer.split, layer.pixels)
            odd = layer.kernel == 0 or layer.kernel % 2 == 1
            require(least >= 1 and odd, "shapes", layer, "sizes of at least 1, and odd kernels")
        require(self.clock == "wall" or self.threads == 1, "clock", "cpu", "wall for threads > 1")
        require(self.threads <= MOST_THREADS, "threads", self.threads, f"at most {MOST_THREADS}")
        for key in ("images", "text"):
            for name, size in (getattr(self, key) or {}).items():
                require(size >= 1, f"{key}.{name}", size, "at least 1")
        self._require_memory()

    def _require_memory(self) -> None:
        """Refuse inputs and weights that this machine cannot hold, before it is measured."""
        for layer in self.shapes or ():
            weight = layer.inputs * layer.outputs * max(1, layer.kernel) ** 2
            require_memory("shapes", layer.label, 4.0 * weight)
            for tokens in self.tokens or ():
                size = 4.0 * tokens * max(layer.inputs, layer.outputs) * layer.pixels**2
                require_memory("tokens", f"{tokens} with {layer.label}", size)
        images, text = self.images or {}, self.text or {}
        pixels = images.get("channels", 1) * images.get("image_size", 1) ** 2
        for batch in self.batches or ():
            most = max(4.0 * pixels, 8.0 * text.get("context_length", 1))
            require_memory("batches", batch, batch * most)


def keys_of(cfg: Mapping[str, Any]) -> Keys:
    """The keys of a run, from conf/bench.yaml with what the command line changed.

    What is null there is as in its suite.

    Raises:
        UserError: in one line that names the key.
    """
    own, suites = dict(cfg), cfg["suites"]
    known = f"{', '.join(suites)} or gpu_all, or a shape instead"
    require(own["suite"] in suites, "suite", own["suite"], known)
    given = {key: value for key, value in own.items() if value is not None}
    keys = {**own, **suites[own["suite"]], **given}
    for key in QUESTION:
        require(key not in given, key, "one", "none beside suite, which has its own")
    others = "suites", "gpu_all", "check_seconds", "table", *QUESTION
    return read_keys(OmegaConf.create({k: v for k, v in keys.items() if k not in others}), Keys)
