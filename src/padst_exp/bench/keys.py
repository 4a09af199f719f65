"""The keys of conf/bench.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from padst_exp.config import Device, require_sparsity
from padst_exp.errors import require


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What to measure; conf/bench.yaml says what each key is."""

    suite: Literal["layers", "model_inference", "model_train", "memory", "gpu_all"]
    device: Device
    dtype: Literal["float32", "bfloat16", "float16"] | None
    threads: int
    rounds: int | None
    clock: Literal["wall", "cpu"]
    budget: float | None
    out: str
    sparsities: list[float] | None
    structures: list[str | dict[str, Any]] | None
    shapes: list[str] | None
    tokens: list[int] | None
    models: list[str | dict[str, Any]] | None
    batches: list[int] | dict[str, list[int]] | None
    scopes: list[Literal["all", "dense_qkv"]] | None
    images: dict[str, int]
    text: dict[str, int]
    usual: dict[str, dict[str, Any]]
    gpu_all: list[dict[str, Any]]

    def __post_init__(self) -> None:
        for sparsity in self.sparsities or ():
            require_sparsity("sparsities", sparsity)
        for key in ("threads", "rounds", "tokens", "batches"):
            value = getattr(self, key)
            for count in value if isinstance(value, list) else [value]:
                good = not isinstance(count, int) or count >= 1
                require(good, key, count, "at least 1")
        require(self.clock == "wall" or self.threads == 1, "clock", "cpu", "wall for threads > 1")
        # NaN is none either.
        require(self.budget is None or self.budget > 0, "budget", self.budget, "seconds")

    def filled(self, part: Mapping[str, Any], device: str) -> Keys:
        """These with the keys of a part of `gpu_all`, and of `usual`, where they are null."""
        usual = self.usual[part["suite"]]
        own = {**usual, **usual[device], **part}
        null = {key: value for key, value in own.items() if getattr(self, key, "") is None}
        return replace(self, suite=part["suite"], **null)
