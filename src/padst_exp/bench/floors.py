"""The least time that work can take here, from ceilings and bytes measured in the same run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from padst_exp.bench.onednn import OneDNNLinear, has_onednn
from padst_exp.bench.timing import Call, Timer
from padst_exp.sparsify import Rule

# Side of the square product that shows the rate of a device.
GEMM = {"cpu": 1024, "cuda": 8192}
MAX_ROTATION = 512


def last_level_cache(device: torch.device) -> int:
    """Bytes of the last-level cache; 32 MiB where the operating system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)([KM])", path.read_text().strip()) for path in files]
    return max((int(s[1]) << {"K": 10, "M": 20}[s[2]] for s in sizes if s), default=32 << 20)


def rotation(size: int, device: torch.device) -> int:
    """How many weights of `size` bytes exceed the last-level cache by far."""
    return max(2, min(MAX_ROTATION, 5 * last_level_cache(device) // (2 * max(1, size))))


class Ceilings(NamedTuple):
    """Bytes that a copy beyond the cache reads and writes, and operations of the fastest dense
    product, both per second."""

    bandwidth: float
    rate: float


@torch.no_grad()
def ceilings(timer: Timer, dtype: torch.dtype) -> Ceilings:
    """Measure what a device reaches; each ceiling is the best of a few timings."""
    device, side = timer.device, GEMM[timer.device.type]
    source = torch.zeros(4 * last_level_cache(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=dtype)
    linear = nn.Linear(side, side, bias=False, device=device, dtype=dtype)
    calls = {"copy": partial(target.copy_, source), "linear": partial(linear, a)}
    if has_onednn(device, dtype):
        calls["oneDNN"] = partial(OneDNNLinear(linear, side), a)
    samples, _ = Timer(device, timer.clock).alternate(calls, rounds=7)
    copy = min(samples.pop("copy"))
    return Ceilings(2 * len(source) / copy, 2 * side**3 / min(map(min, samples.values())))


def bytes_twin(
    inputs: int, outputs: int, weight: int, passes: Sequence[str], device: torch.device
) -> Call:
    """A call that reads and writes what the passes of one product must, and computes nothing.

    `inputs`, `outputs` and `weight` are bytes; `passes` are some of "forward", "dX" and "dW".
    Activations stay where the product would find them; weights come from beyond the cache.
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
        moves += [partial(target.copy_, source)] if copied else []
        moves += [partial(torch.amax, rest, 0)] if len(rest) else []
    return [*moves, write.zero_] if len(write) else moves


class Work:
    """Operations and weights of a dense model, counted in one `forward` of a sample."""

    def __init__(
        self, module: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], sample: Tensor
    ) -> None:
        # Attention counts as its two products, causal or not, which every device has.
        attention = sdpa_kernel(SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, attention, torch.no_grad():
            forward(module, sample)
        counts, root = counter.get_flop_counts(), type(module).__name__
        self.total = sum(counts["Global"].values()), sum(p.numel() for p in module.parameters())
        self.layers = {
            name: (sum(counts.get(f"{root}.{name}", {}).values()), layer.weight.numel())
            for name, layer in module.named_modules()
            if isinstance(getattr(layer, "weight", None), Tensor)
        }

    def left(self, rules: Sequence[Rule], density: float) -> tuple[float, float]:
        """Operations and weights that are left when `rules` make layers sparse."""
        found = [n for n in self.layers if any(fnmatchcase(n, rule.pattern) for rule in rules)]
        saved = [(1 - density) * sum(self.layers[name][i] for name in found) for i in range(2)]
        return self.total[0] - saved[0], self.total[1] - saved[1]
