"""Sparse Wide: the whole network sqrt(1 / (1 - s)) times wider."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from padst_exp.errors import UserError
from padst_exp.layers.views import LinearView
from padst_exp.sparsify import Rule
from padst_exp.transforms.transform import Original, Rewrite, Transform


class SparseWide(Transform):
    """Every hidden width times sqrt(1 / (1 - s)), so that a matrix has 1 / (1 - s) times the
    entries; stem and head widen on their inner side and stay dense.

    The model's constructor says which key is its width: `width`, a factor (convolutional
    networks), or `dim`, of the residual stream, which stays a multiple of `heads` (and `mlp_dim`
    beside it).

    Args:
        scope: as in `Transform`.
    """

    def rewrite(
        self,
        model: nn.Module,
        original: Original,
        chosen: Sequence[tuple[LinearView, Rule]],
        sparsity: float,
    ) -> Rewrite:
        return Rewrite(
            original.build(widened(original.keys, math.sqrt(1 / (1 - sparsity)))), original.rules
        )


def widened(keys: Mapping[str, object], factor: float) -> dict[str, object]:
    """The keys of a model that change when all its hidden widths grow by `factor`.

    Raises:
        UserError: the model has no key for its width.
    """
    width, dim, heads = keys.get("width"), keys.get("dim"), keys.get("heads", 1)
    if isinstance(width, float):
        return {"width": width * factor}
    if not isinstance(dim, int) or not isinstance(heads, int):
        raise UserError(
            "transform: expected another one, SparseWide needs a model with a key `width` or "
            f"`dim`, got one with {', '.join(keys)}"
        )
    mlp_dim = keys.get("mlp_dim")
    if not isinstance(mlp_dim, int):
        return {"dim": _multiple(dim * factor, heads)}
    # Rotary embeddings turn the features of a head in pairs.
    return {"dim": _multiple(dim * factor, 2 * heads), "mlp_dim": round(mlp_dim * factor)}


def _multiple(width: float, step: int) -> int:
    """The least multiple of `step` that is not below `width`; 768.0000001 is not above 768."""
    return step * math.ceil(width / step - 1e-9)
