"""A transformed model again, from plain data: what an export of one is loaded into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from padst_exp.errors import UserError
from padst_exp.inference.files import own
from padst_exp.sparsify import Rule
from padst_exp.transforms.transform import Original, example

# Nothing else is ever called by its name.
_MODELS, _TRANSFORMS = "padst_exp.models.", "padst_exp.transforms."


def rebuild(
    *,
    model: Mapping[str, Any],
    transform: Mapping[str, Any],
    rules: Sequence[Mapping[str, Any]],
    sparsity: float,
    shape: Mapping[str, int],
) -> nn.Module:
    """The dense model that a transform once made, with weights to be replaced.

    Args:
        model: `_target_` of a constructor in `padst_exp.models` and its `arguments`.
        transform: the same of one in `padst_exp.transforms`.
        rules: `pattern` and `split` of each rule.
        sparsity: as was asked for.
        shape: what the data set gave to the model.

    Raises:
        UserError: a constructor is none of ours.
    """
    original = Original(
        build=lambda changes: _call(model, _MODELS, changes),
        keys={key: v for key, v in model["arguments"].items() if key not in shape},
        rules=[Rule(**rule) for rule in rules],
        inputs=example(shape),
    )
    made: nn.Module = _call(transform, _TRANSFORMS, {})(original, sparsity, "uniform").model
    return made


def _call(call: Mapping[str, Any], home: str, changes: Mapping[str, object]) -> Any:
    target = call["_target_"]
    if not target.startswith(home):
        raise UserError(f"{target!r} is none of {home}*, which alone are called for a file")
    return own(target)(**{**call["arguments"], **changes})
