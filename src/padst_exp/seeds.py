"""All randomness comes from here: independent streams, and seeds of single draws.

What is random depends on the seed of the run and on where it happens (which weight, which sample,
which step), never on what was drawn before or by whom.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray


def stream(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` only, e.g. `stream(seed, "topology", position)`.

    Hashing keeps streams apart: a generator seeded with the run's own seed would repeat the very
    numbers that initialised the model, and draw topologies that depend on the weights.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def mixed(*parts: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes integers, or arrays of them, elementwise into uniform 64-bit ones (SplitMix64).

    Steele et al., "Fast splittable pseudorandom number generators", 2014.
    """
    state: NDArray[np.uint64] = np.zeros((1,), np.uint64)
    for part in parts:
        if isinstance(part, int):
            part = np.array([part % 2**64], np.uint64)
        state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def seed_of(purpose: str, *parts: int) -> int:
    """A seed below 2**32, which numpy's global generator accepts.

    Args:
        purpose: keeps the streams of one run apart, e.g. "dropout".
        parts: integers, the run's seed first.
    """
    return int(mixed(zlib.crc32(purpose.encode()), *parts)[0] >> np.uint64(32))


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, on every device, below 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def preserved_rng(seed: int) -> Iterator[None]:
    """Seeds the global CPU generators of Python, numpy and torch inside, restores them after.

    timm and torchvision transforms draw from these three.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
