"""What the kernels share: how much one program computes, and how it finds its columns."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class LaunchShape:
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


@triton.jit
def load_columns(columns, k, inside, in_features, RUN: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The features of x behind columns k of a row group, and which of them exist."""
    if RUN == 1:
        column = tl.load(columns + k, mask=inside, other=in_features)
        known = inside & (column < in_features)
    else:
        run = tl.load(columns + k // RUN * RUN, mask=inside, other=in_features)
        column = run // RUN * RUN + k % RUN
        known = inside & (run < in_features) & (column < in_features)
    return column, known
