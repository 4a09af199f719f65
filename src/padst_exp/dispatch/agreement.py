"""Whether one way to compute something computes the same as another."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Largest relative error at which a kernel may replace plain PyTorch.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of `theirs`; NaN where either has one."""
    return float((ours - theirs).float().norm() / theirs.float().norm().clamp(min=1e-30))


def agrees(name: str, call: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]) -> bool:
    """Whether `call` runs and returns what is `expected`, up to rounding. Says so when not.

    Args:
        name: of the backend, for the message.
        call: is run once.
        expected: tensors of one dtype, which sets the tolerance.
    """
    try:
        differences = [difference(a, b) for a, b in zip(call(), expected, strict=True)]
    # Whatever is wrong with a kernel here (Triton's errors have no narrower base), another is used.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
    else:
        # One by one: the maximum of numbers and NaN can be a number.
        limit = TOLERANCE[expected[0].dtype]
        if all(value <= limit for value in differences):
            return True
        wrong = next(value for value in differences if not value <= limit)
        reason = f"its results differ by {wrong:.2g}"
    logging.getLogger(__name__).warning("backend %s is not used here: %s", name, reason)
    return False
