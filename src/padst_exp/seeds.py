"""Independent random streams from one seed."""

from __future__ import annotations

import hashlib

import torch


def stream(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` only, e.g. `stream(seed, "topology", position)`.

    Hashing keeps streams apart: a generator seeded with the run's own seed would repeat the very
    numbers that initialised the model, and draw topologies that depend on the weights.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
