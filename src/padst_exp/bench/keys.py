"""The keys of conf/bench.yaml."""

from dataclasses import dataclass
from typing import Literal

from padst_exp.config import Device, require_sparsity
from padst_exp.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class BenchSchema:
    """What to measure. Null leaves a choice to the suite and the device.

    Args:
        suite: what to measure.
        device: "auto" takes the GPU where there is one.
        dtype: of weights and activations; of autocast in training.
        threads: of a CPU.
        rounds: timings of each side; they alternate.
        clock: "wall", or "cpu": time of one thread, for a machine that others share.
        shapes: of single layers, a model's name for all of its own, or outputs x inputs.
        tokens: that single layers multiply.
        sparsities: of single layers.
        structures: names as `nm-64`, `block-32`, `diag-stride-32`, `diag-1`, `unstructured`.
        models: options of the group `model`.
        batches: of the models.
        sparsity: of the models.
        scopes: which layers of a model are sparse: "all" block linears, or "dense_qkv".
        budget: seconds that all of `gpu_all` may take, or one other suite; then what is left is
            named and skipped.
        out: folder of the results.
    """

    suite: Literal["layers", "model_inference", "model_train", "memory", "gpu_all"]
    device: Device
    dtype: Literal["float32", "bfloat16", "float16"] | None
    threads: int
    rounds: int | None
    clock: Literal["wall", "cpu"]
    shapes: list[str] | None
    tokens: list[int] | None
    sparsities: list[float]
    structures: list[str] | None
    models: list[str] | None
    batches: list[int] | None
    sparsity: float
    scopes: list[Literal["all", "dense_qkv"]]
    budget: float | None
    out: str

    def __post_init__(self) -> None:
        require_sparsity("sparsity", self.sparsity)
        for sparsity in self.sparsities:
            require_sparsity("sparsities", sparsity)
        for key in ("threads", "rounds", "tokens", "batches"):
            value = getattr(self, key)
            for count in value if isinstance(value, list) else [value]:
                require(count is None or count >= 1, key, count, "at least 1")
        if self.clock == "cpu" and self.threads > 1:
            raise UserError("clock: cpu counts the time of one thread; set threads=1 or clock=wall")
        # NaN is none either.
        require(self.budget is None or self.budget > 0, "budget", self.budget, "seconds")
