"""The keys of conf/bench.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf

from padst_exp.bench.choices import Layer
from padst_exp.config import Device, read_keys, require_sparsity
from padst_exp.errors import require
from padst_exp.memory import require_memory

MOST_THREADS = 1024


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
    require(own["suite"] in suites, "suite", own["suite"], f"{', '.join(suites)} or gpu_all")
    given = {key: value for key, value in own.items() if value is not None}
    keys = {**own, **suites[own["suite"]], **given}
    others = "suites", "gpu_all", "check_seconds", "title"
    return read_keys(OmegaConf.create({k: v for k, v in keys.items() if k not in others}), Keys)
