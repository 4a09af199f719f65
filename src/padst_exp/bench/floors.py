"""The least time that work can take here, from ceilings and bytes measured in the same run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from padst_exp.bench.onednn import OneDNNLinear, has_onednn
from padst_exp.bench.timing import Budget, Call, Clock, alternate
from padst_exp.sparsify import Rule

ROUNDS = 7
# Side of the square product that shows the rate of a device.
GEMM = {"cpu": 1024, "cuda": 8192}
# Bytes of the last-level cache where the operating system does not tell.
UNKNOWN_CACHE = 32 << 20
MAX_ROTATION = 512


def last_level_cache(device: torch.device) -> int:
    """Size of the last-level cache in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)([KM])", path.read_text().strip()) for path in files]
    return max((int(s[1]) << {"K": 10, "M": 20}[s[2]] for s in sizes if s), default=UNKNOWN_CACHE)


def rotation(size: int, device: torch.device) -> int:
    """How many weights of `size` bytes exceed the last-level cache by far."""
    return max(2, min(MAX_ROTATION, 5 * last_level_cache(device) // (2 * max(1, size))))


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches.

    Args:
        bandwidth: bytes read and written per second by a copy beyond the last-level cache.
        rate: floating point operations per second of the fastest dense product.
    """

    bandwidth: float
    rate: float


@torch.no_grad()
def ceilings(clock: Clock, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings of a device; each is the best of a few timings."""
    device, side = clock.device, GEMM[clock.device.type]
    source = torch.zeros(4 * last_level_cache(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=dtype)
    linear = nn.Linear(side, side, bias=False, device=device, dtype=dtype)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source), "linear": lambda: linear(a)}
    if has_onednn(device, dtype):
        onednn = OneDNNLinear(linear, side)
        calls["oneDNN"] = lambda: onednn(a)
    for call in calls.values():
        call()
    samples = alternate(calls, clock, rounds=ROUNDS, block=2e-3, budget=Budget(), passes={})
    copy = min(samples.pop("copy"))
    product = min(min(seconds) for seconds in samples.values())
    return Ceilings(2 * len(source) / copy, 2 * side**3 / product)


def bytes_twin(
    inputs: int, outputs: int, weight: int, passes: Sequence[str], device: torch.device
) -> Call:
    """A call that reads and writes what the passes of one product must, and computes nothing.

    Activations stay where the product would find them; weights come from beyond the last-level
    cache.

    Args:
        inputs: bytes of x.
        outputs: bytes of y.
        weight: bytes of the weight and its indices.
        passes: some of "forward", "dX" and "dW".
        device: where the bytes are.
    """

    def words(size: int) -> Tensor:
        return torch.zeros(max(1, size // 4), dtype=torch.int32, device=device)

    x, dx, y, dy = words(inputs), words(inputs), words(outputs), words(outputs)
    # Moves are made now: for a single token making views would take as long as the bytes.
    variants = []
    for one in [words(weight) for _ in range(rotation(weight, device))]:
        moved = {"forward": ([x, one], y), "dX": ([dy, one], dx), "dW": ([x, dy], one)}
        variants.append([move for name in passes for move in _moves(*moved[name])])
    turns = itertools.cycle(variants)

    def call() -> None:
        for move in next(turns):
            move()

    return call


def _moves(reads: Sequence[Tensor], write: Tensor) -> list[Call]:
    """Calls that read every word of `reads` and write every word of `write`, each once."""
    moves: list[Call] = []
    for read in reads:
        copied = min(len(read), len(write))
        source, rest, target, write = read[:copied], read[copied:], write[:copied], write[copied:]
        moves += [lambda t=target, s=source: t.copy_(s)] if copied else []
        moves += [lambda r=rest: torch.amax(r, 0)] if len(rest) else []
    return [*moves, write.zero_] if len(write) else moves


class Work:
    """Operations and weights of a dense model, by layer.

    Args:
        module: the dense model.
        forward: what is done with it, once, to count.
        inputs: one sample, on the device of `module`.
    """

    def __init__(
        self, module: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], inputs: Tensor
    ) -> None:
        # Attention counts as its two products, causal or not, which every device has.
        attention = sdpa_kernel(SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, attention, torch.no_grad():
            forward(module, inputs)
        counts, root = counter.get_flop_counts(), type(module).__name__
        self.operations = sum(counts["Global"].values())
        self.weights = sum(parameter.numel() for parameter in module.parameters())
        self.layers = {
            name: (sum(counts.get(f"{root}.{name}", {}).values()), layer.weight.numel())
            for name, layer in module.named_modules()
            if isinstance(getattr(layer, "weight", None), Tensor)
        }

    def floor(
        self, ceilings: Ceilings, rules: Sequence[Rule], density: float, batch: int, itemsize: int
    ) -> float:
        """Seconds of a forward pass: its operations, or reading its weights; whichever is longer.

        Args:
            ceilings: of the device.
            rules: which layers are sparse.
            density: density of those.
            batch: samples.
            itemsize: bytes of one weight.
        """
        sparse = [
            self.layers[name]
            for name in self.layers
            if any(fnmatchcase(name, rule.pattern) for rule in rules)
        ]
        saved = [(1 - density) * sum(column) for column in zip((0, 0), *sparse, strict=True)]
        operations, weights = self.operations - saved[0], self.weights - saved[1]
        return max(batch * operations / ceilings.rate, weights * itemsize / ceilings.bandwidth)
