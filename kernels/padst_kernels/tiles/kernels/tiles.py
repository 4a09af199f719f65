"""What one program of a kernel computes."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Tile:
    """What one program computes: `tokens` x `columns` per step, by `warps`, `stages` deep.

    With `row_blocks` above 1 a program computes that many neighbouring blocks of rows one after the
    other (the largest common divisor with how many there are), and reads x through the L1 cache.
    """

    tokens: int
    columns: int
    warps: int
    stages: int
    row_blocks: int = 1


def block_height(height: int) -> int:
    """Rows of a tile that one program computes: a power of two of at least 8."""
    if height >= 128:
        return 128
    return max(8, triton.next_power_of_2(height))
