"""Which constructors a configuration may name.

What a user types, or keeps in a folder of YAML files of their own, may name any. A configuration
that lies in a run, a checkpoint or an export may be anybody's: it is data, and names ours alone.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

# The groups of a training, and where their constructors are.
HOMES: Mapping[str, str] = {
    "model": "padst_exp.models",
    "dataset": "padst_exp.data",
    "transform": "padst_exp.transforms",
    "structure": "padst_exp.structures",
    "dst": "padst_exp.dst",
    "permutation": "padst_exp.permutations",
    "optimizer": "padst_exp.engine.optimizers",
    "trainer": "padst_exp.engine.settings",
    "logger": "padst_exp.engine.loggers",
}


def find(target: str) -> Callable[..., Any]:
    """The callable that a dotted path names; imports its module.

    Raises:
        ValueError: there is none, or a module of ours has it from elsewhere.
    """
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"expected package.module.name, got {target!r}")
    name, attribute = ".".join(parts[:-1]), parts[-1]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A missing dependency of an existing module is not a misspelt target.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"no module {name!r}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ValueError(f"{name} has no {attribute!r}")
    home = str(getattr(found, "__module__", None))
    if within(name, "padst_exp") and not within(home, "padst_exp"):
        raise ValueError(f"{target} is none of ours, it is from {home}")
    return cast(Callable[..., Any], found)


def constructor(target: str, home: str) -> Callable[..., Any]:
    """The constructor of ours that a file names.

    Args:
        target: its dotted path.
        home: the package that it has to be in.

    Raises:
        ValueError, ImportError: there is none, or it is no constructor.
    """
    if not within(target, home):
        raise ValueError(f"{target!r} is none of {home}.*, which alone are called for a file")
    found = find(target)
    keyword_parameters(found)
    return found


def keyword_parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor, annotations evaluated.

    Raises:
        ValueError: it is none: one takes keywords alone, each of them annotated.
    """
    name = getattr(target, "__qualname__", str(target))
    try:
        parameters = dict(inspect.signature(target, eval_str=True).parameters)
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is no constructor: {error}") from error
    for parameter in parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise ValueError(f"{name} is no constructor: it takes {parameter.name} by position")
        if parameter.annotation is parameter.empty:
            raise ValueError(f"{name} is no constructor: its {parameter.name} is not annotated")
    return parameters


def within(target: str, package: str) -> bool:
    """Whether a dotted path is that of a package, or leads into it."""
    return f"{target}.".startswith(f"{package}.")


def foreign(config: Mapping[Any, Any], trust: Collection[str]) -> Iterator[tuple[str, object]]:
    """Every target in a training config that is neither of its group's home nor trusted.

    Args:
        config: plain containers; nodes with a `_target_` may stand at any depth.
        trust: packages that the user vouches for.

    Yields:
        The dotted key of the node, and its target.
    """
    for key, target in named(config):
        home = HOMES.get(key.partition(".")[0])
        known = [*trust] if home is None else [home, *trust]
        if not (isinstance(target, str) and any(within(target, one) for one in known)):
            yield key, target


def named(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    """The dotted key of every mapping in `node` that has a `_target_`, and this target."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node["_target_"]
        for name, value in node.items():
            yield from named(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from named(value, f"{key}[{number}]")
