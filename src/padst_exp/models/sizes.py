"""What the sizes of all models must be, so that there is a model at all."""

from padst_exp.errors import require

# As deep as anything that was ever trained; more would only take for ever to build.
DEEPEST = 1000
# Whether so much fits is for the memory to say; PyTorch counts in 64 bits.
WIDEST = 10**9


def require_depth(depth: int) -> None:
    """Raise a `UserError` unless there is a number of blocks that can be built."""
    require(1 <= depth <= DEEPEST, "model.depth", depth, f"from 1 to {DEEPEST} blocks")


def require_rate(key: str, rate: float) -> None:
    """Raise a `UserError` unless `rate` is one at which something is left out, or 0."""
    require(0 <= rate < 1, f"model.{key}", rate, "a rate in [0, 1)")


def require_hidden(dim: int, ratio: float) -> None:
    """Raise a `UserError` unless MLPs of `ratio` times `dim` have a hidden unit."""
    wanted = f"a width over model.dim={dim} that makes at least one hidden unit"
    require(dim >= 1, "model.dim", dim, "at least 1")
    fits = ratio > 0 and 1 <= int(dim * ratio) <= WIDEST
    require(fits, "model.mlp_ratio", ratio, f"{wanted}, and at most {WIDEST:.0e}")
