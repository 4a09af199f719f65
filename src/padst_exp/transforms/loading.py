"""A transformed model again, from plain data: what an export of one is loaded into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from padst_exp.sparsify import Rule
from padst_exp.targets import HOMES, constructor
from padst_exp.transforms.transform import Original, example


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
        ValueError: a constructor is none of ours.
    """
    original = Original(
        build=lambda changes: _call(model, HOMES["model"], changes),
        keys={key: v for key, v in model["arguments"].items() if key not in shape},
        rules=[Rule(**rule) for rule in rules],
        inputs=example(shape),
    )
    made: nn.Module = _call(transform, HOMES["transform"], {})(original, sparsity, "uniform").model
    return made


def _call(call: Mapping[str, Any], home: str, changes: Mapping[str, object]) -> Any:
    return constructor(call["_target_"], home)(**{**call["arguments"], **changes})
