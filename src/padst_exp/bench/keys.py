"""The keys of conf/bench.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf
from pydantic import with_config

from padst_exp.config import Device, read_keys, require_sparsity
from padst_exp.errors import require


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Shape:
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
    budget: float | None
    out: str
    sparsities: list[float]
    structures: list[str | dict[str, Any]]
    shapes: list[Shape] | None
    tokens: list[int] | None
    models: list[str | dict[str, Any]] | None
    batches: list[int] | dict[str, list[int]] | None
    scopes: list[Literal["all", "dense_qkv"]] | None
    images: dict[str, int] | None
    text: dict[str, int] | None

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            require_sparsity("sparsities", sparsity)
        batches = self.batches if isinstance(self.batches, dict) else {"": self.batches}
        counts = [("threads", self.threads), ("rounds", self.rounds)]
        counts += [("tokens", count) for count in self.tokens or ()]
        counts += [("batches", count) for some in batches.values() for count in some or ()]
        for key, count in counts:
            require(count >= 1, key, count, "at least 1")
        for shape in self.shapes or ():
            least = min(shape.inputs, shape.outputs, shape.split, shape.pixels)
            odd = shape.kernel == 0 or shape.kernel % 2 == 1
            require(least >= 1 and odd, "shapes", shape, "sizes of at least 1, and odd kernels")
        require(self.clock == "wall" or self.threads == 1, "clock", "cpu", "wall for threads > 1")
        # NaN is none either.
        require(self.budget is None or self.budget > 0, "budget", self.budget, "seconds")


def filled(cfg: Mapping[str, Any], part: Mapping[str, Any], device: str) -> Keys:
    """The keys of one suite; what is null in `cfg` is as in `part`, or else as the suite has it.

    Args:
        cfg: conf/bench.yaml with what the command line changed, in plain containers.
        part: the key `suite`, and in `gpu_all` others.
        device: "cpu" or "cuda", for which a suite may have keys of its own.

    Raises:
        UserError: in one line that names the key.
    """
    suites = cfg["suites"]
    require(part["suite"] in suites, "suite", part["suite"], f"{', '.join(suites)} or gpu_all")
    suite = suites[part["suite"]]
    given = {key: value for key, value in cfg.items() if value is not None}
    keys = {**cfg, **suite, **suite.get(device, {}), **part, **given, "suite": part["suite"]}
    others = "suites", "gpu_all", "title", "cpu", "cuda"
    return read_keys(OmegaConf.create({k: v for k, v in keys.items() if k not in others}), Keys)
