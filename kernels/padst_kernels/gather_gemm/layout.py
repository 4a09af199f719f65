"""How activations lie in memory: `[features, T]` views, feature-major or token-major.

Feature-major (tokens contiguous) is `memory[:, :T]` of a `[features, LD]` tensor whose rows all
start on multiples of 16 elements, so that kernels copy 16 bytes at a time. What stands in the
padding is never read into a result, and may be anything. Token-major (features contiguous) is
`memory.t()` of a `[T, features]` tensor.
"""

from __future__ import annotations

from torch import Tensor

# Rows of a feature-major tensor start on multiples of this many elements.
ALIGNMENT = 16


def empty_features(
    num_features: int, num_tokens: int, like: Tensor, feature_major: bool = True
) -> Tensor:
    """An uninitialised `[num_features, num_tokens]` view, aligned, dtype and device of `like`."""
    if not feature_major:
        return like.new_empty(num_tokens, num_features).t()
    padded = -(-num_tokens // ALIGNMENT) * ALIGNMENT
    return like.new_empty(num_features, padded)[:, :num_tokens]


def readable_tokens(name: str, x: Tensor) -> int:
    """How many tokens may be touched: the padding of feature-major rows keeps accesses wide."""
    num_tokens = x.shape[1]
    if x.stride(0) == 1:
        return num_tokens
    start = x.data_ptr() // x.element_size()
    if x.stride(1) != 1 or x.stride(0) % ALIGNMENT or start % ALIGNMENT:
        raise ValueError(
            f"{name}: feature-major rows must start on multiples of {ALIGNMENT} elements, got "
            f"strides {x.stride()} at element {start % ALIGNMENT}; use empty_features, or give a "
            "token-major tensor"
        )
    return -(-num_tokens // ALIGNMENT) * ALIGNMENT
