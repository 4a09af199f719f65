"""Whether one way to compute something computes the same as another; the fastest that does."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from padst_exp.dispatch.timing import timings

Call = Callable[[], Sequence[Tensor]]
Name = TypeVar("Name", bound=str)

# Largest relative error at which a kernel may replace plain PyTorch.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Rounding spreads over a result; a mistake in one row or token does not, and must not hide behind
# all others. A single slice may still be off by so many times the tolerance.
SLICE = 4


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of `theirs`; NaN where either has one.

    Or, where that is more, the same of the worst slice along any dimension, over `SLICE`.
    """
    if not theirs.numel():
        return 0.0
    wide = torch.promote_types(theirs.dtype, torch.float32)
    error, size = ours.to(wide) - theirs.to(wide), theirs.to(wide)
    tiny = torch.finfo(wide).tiny
    norm = size.norm().clamp(min=tiny)
    found = [error.norm() / norm]
    for dim, length in enumerate(theirs.shape if theirs.dim() > 1 else ()):
        others = [other for other in range(theirs.dim()) if other != dim]
        # A slice that should be zero is as wrong as it is large beside the others.
        least = norm / math.sqrt(length)
        slices = torch.linalg.vector_norm(error, dim=others)
        worst = slices / torch.linalg.vector_norm(size, dim=others).maximum(least)
        found.append(worst.max() / SLICE)
    return float(torch.stack(found).max())


def agrees(name: str, call: Call, expected: Sequence[Tensor]) -> bool:
    """Whether `call` runs and returns what is `expected`, up to rounding. Says so when not.

    Args:
        name: backend that is tried, for the message.
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


def fastest_right(
    what: Mapping[str, object],
    candidates: Mapping[Name, Call],
    dense: Call,
    truth: Sequence[Tensor],
    *,
    device: torch.device,
) -> tuple[Name | None, dict[str, float]]:
    """The fastest of `candidates` that computes the `truth`; None where none does.

    Times may come from the cache, the truth never does.

    Args:
        what, device: as in `timings`.
        candidates: ways to compute it, by name.
        dense: is timed beside them, as "dense".
        truth: what a dense weight in plain PyTorch computes.

    Returns:
        Its name, and the seconds of all that are right as far as is known.
    """
    seconds = timings(
        what,
        lambda: {
            **{name: call for name, call in candidates.items() if agrees(name, call, truth)},
            "dense": dense,
        },
        device=device,
    )
    for name in sorted(candidates.keys() & seconds.keys(), key=seconds.__getitem__):
        if agrees(name, candidates[name], truth):
            return name, seconds
        del seconds[name]
    return None, seconds
