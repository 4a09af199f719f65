"""The least time a product can take here: ceilings and bytes, measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from padst_exp.bench.dense import has_onednn, onednn_linear, packed_weight
from padst_exp.bench.environment import last_level_cache, rotation
from padst_exp.bench.timing import Budget, Call, Clock, alternate

ROUNDS = 7
# Sides of the square product that shows the rate of a device.
GEMM = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches.

    Args:
        bandwidth: bytes read and written a second, copying beyond the last-level cache.
        rate: floating point operations a second of the fastest dense product in one dtype.
    """

    bandwidth: float
    rate: float

    def row(self) -> dict[str, object]:
        """Columns of every row."""
        return {
            "copy_gb_per_s": round(self.bandwidth / 1e9, 1),
            "gemm_gflops": round(self.rate / 1e9, 1),
        }


def measure(clock: Clock, dtype: torch.dtype) -> Ceilings:
    """The ceilings of a device, the best of a few timings each."""
    device = clock.device
    size = 4 * last_level_cache(device)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = GEMM[device.type]
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "usual": lambda: torch.nn.functional.linear(a, b),
    }
    if has_onednn(device, dtype):
        packed = packed_weight(b, side)
        calls["oneDNN"] = lambda: onednn_linear(a, packed)
    with torch.no_grad():
        samples = alternate(calls, clock, rounds=ROUNDS, block=2e-3, budget=Budget(None))
    best = {name: min(seconds) for name, seconds in samples.items()}
    product = min(seconds for name, seconds in best.items() if name != "copy")
    return Ceilings(2 * size / best["copy"], 2 * side**3 / product)


class BytesTwin:
    """Reads and writes what the passes of one product must, and computes nothing.

    Activations stay where the product would find them; weights come from beyond the last-level
    cache.

    Args:
        inputs: bytes of x.
        outputs: bytes of y.
        weight: bytes of the weight and its indices.
        passes: of "forward", "dX" and "dW".
        device: where.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        weight: int,
        *,
        passes: Sequence[str],
        device: torch.device,
    ) -> None:
        def words(size: int) -> Tensor:
            return torch.zeros(max(1, size // 4), dtype=torch.int32, device=device)

        x, y = words(inputs), words(outputs)
        weights = [words(weight) for _ in range(rotation(weight, device))]
        # Views are made now: for a single token making them would take as long as the bytes.
        self.variants: list[list[tuple[Tensor | None, Tensor | None]]] = []
        dy, dx = words(outputs), words(inputs)
        for one in weights:
            moved = {"forward": ([x, one], y), "dX": ([dy, one], dx), "dW": ([x, dy], one)}
            self.variants.append([move for name in passes for move in _moves(*moved[name])])
        self._next = 0

    def __call__(self) -> None:
        """All passes once."""
        for read, write in self.variants[self._next]:
            if read is not None and write is not None:
                write.copy_(read)
            elif read is not None:
                torch.amax(read, 0)
            elif write is not None:
                write.zero_()
        self._next = (self._next + 1) % len(self.variants)


def _moves(reads: list[Tensor], write: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
    """Pairs that read every word of `reads` and write every one of `write`, each once."""
    moves: list[tuple[Tensor | None, Tensor | None]] = []
    written = 0
    for read in reads:
        part = min(len(read), len(write) - written)
        if part:
            moves.append((read[:part], write[written : written + part]))
        if part < len(read):
            moves.append((read[part:], None))
        written += part
    if written < len(write):
        moves.append((None, write[written:]))
    return moves
