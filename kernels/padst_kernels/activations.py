"""How activations lie in memory: `[features, T]` views, feature-major or token-major.

Feature-major (tokens contiguous) is `memory[:, :T]` of a `[features, LD]` tensor whose rows all
start on multiples of 16 elements, so that kernels copy 16 bytes at a time. What stands in the
padding is never read into a result, and may be anything. Token-major (features contiguous) is
`memory.t()` of a `[T, features]` tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a feature-major tensor start on multiples of this many elements.
ALIGNMENT = 16


def empty_features(
    num_features: int, num_tokens: int, like: Tensor, feature_major: bool = True
) -> Tensor:
    """An uninitialised `[num_features, num_tokens]` view, aligned, dtype and device of `like`."""
    if not feature_major:
        return like.new_empty(num_tokens, num_features).t()
    return like.new_empty(num_features, _padded(num_tokens))[:, :num_tokens]


def aligned_features(x: Tensor) -> Tensor:
    """Copy token-major activations into aligned feature-major ones.

    Args:
        x: `[T, I]`.

    Returns:
        `[I, T]` view of `[I, LD]`, LD the next multiple of 16. Differentiable.
    """
    num_tokens = x.shape[0]
    padding = _padded(num_tokens) - num_tokens
    if padding == 0:
        return x.t().clone(memory_format=torch.contiguous_format)
    return torch.nn.functional.pad(x.t(), (0, padding))[:, :num_tokens]


def has_aligned_rows(x: Tensor) -> bool:
    """Whether `x` is feature-major and all rows start on multiples of 16 elements of its memory.

    Rows of an expanded tensor share one start, and no padding follows them.
    """
    if x.numel() == 0:
        return True
    # Dynamo cannot follow an offset; kernels look at the address.
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    stride = x.stride(0)
    starts_aligned = stride % ALIGNMENT == 0 and offset % ALIGNMENT == 0
    return bool(x.stride(1) == 1 and starts_aligned and stride >= x.shape[1])


def readable_tokens(name: str, x: Tensor) -> int:
    """How many tokens may be touched: the padding of feature-major rows keeps accesses wide.

    Raises:
        ValueError: `x` is neither token-major nor aligned.
    """
    num_tokens = x.shape[1]
    if x.stride(0) == 1:
        return num_tokens
    start = x.data_ptr() // x.element_size()
    if not has_aligned_rows(x) or start % ALIGNMENT:
        raise ValueError(
            f"{name}: feature-major rows must start on multiples of {ALIGNMENT} elements, got "
            f"strides {x.stride()} at element {start % ALIGNMENT}; use empty_features, or give a "
            "token-major tensor"
        )
    return _padded(num_tokens)


def _padded(num_tokens: int) -> int:
    return -(-num_tokens // ALIGNMENT) * ALIGNMENT
