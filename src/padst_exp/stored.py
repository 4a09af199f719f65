"""Training configs that were stored in a run, a checkpoint or an export: data, from anybody.

Nothing in one is resolved, and nothing but our own constructors is called for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from padst_exp.errors import UserError, require
from padst_exp.messages import say
from padst_exp.targets import HOMES, foreign

MOST_BYTES, DEEPEST = 1 << 20, 20
# No key of these changes a weight that a checkpoint holds.
FREE = ("dataset", "trainer", "logger")


def parse(text: str) -> DictConfig:
    """A training config as `train` wrote it.

    Raises:
        ValueError, YAMLError, OmegaConfBaseException: it is none, or wants something resolved.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text)} characters")
    require_modest(text)
    cfg = OmegaConf.create(text)
    if not isinstance(cfg, DictConfig):
        raise ValueError("it is no mapping")
    for key, value in _strings(OmegaConf.to_container(cfg, resolve=False)):
        if "${" in value:
            raise ValueError(f"{key}: expected a value, got the interpolation {value}")
    return cfg


def require_ours(cfg: DictConfig, where: object, trust: Sequence[str]) -> None:
    """Refuse a stored config that names anything but our own constructors, before an import.

    Args:
        cfg: from `parse`.
        where: it was stored, for messages.
        trust: packages that the user vouches for; a line says which of their targets are called.

    Raises:
        UserError: names the key and the target.
    """
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    for key, target in foreign(plain, trust):
        home = HOMES.get(key.partition(".")[0])
        wanted = "no _target_" if home is None else f"a _target_ in {home}"
        package = str(target).partition(".")[0]
        other = home is not None and package.isidentifier() and package != "padst_exp"
        hint = f"; trust={package} runs it all the same" if other else ""
        raise UserError(f"{where}: {key}: expected {wanted}, got {target!r}{hint}")
    if trust:
        for key, target in foreign(plain, ()):
            say(f"{where}: {key} is {target}, which you trust")


def change(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Give `cfg` other values of keys that change no weight: where the data are now, above all.

    Args:
        cfg: from `parse`, changed in place.
        overrides: as on a command line, e.g. `dataset.root=/data`. The user's own word: they may
            be interpolations.

    Raises:
        UserError: such a key changes weights, or is no single key.
        HydraException: one that cannot be read.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, _value(override)
        group, _, rest = key.partition(".")
        free = ", ".join(f"{name}.*" for name in FREE)
        wanted = f"a change that leaves the weights as they are ({free})"
        require(group in FREE, key, value, wanted)
        require(rest != "", key, value, f"one of its keys, as in {group}.key=value")
        try:
            OmegaConf.update(cfg, key, value, merge=False)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{key}: cannot be {value}: {reason}") from error


def require_modest(text: str) -> None:
    """Refuse YAML of which a little text stands for any amount of memory or time.

    Raises:
        ValueError, YAMLError: it is such, or no YAML.
    """
    depth = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has an alias, *{event.anchor}")


def _value(override: Override) -> Any:
    key = override.key_or_group
    if override.is_delete():
        raise UserError(f"~{key}: expected {key}=value, a key of a run cannot be removed")
    if override.is_sweep_override():
        raise UserError(f"{key}: expected one value, got {override.input_line}")
    holder = OmegaConf.create({"value": override.value()})
    return OmegaConf.to_container(holder, resolve=True)["value"]  # type: ignore[call-overload,index]


def _strings(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings in plain containers, keys too, by the dotted key where they stand."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            inner = f"{key}.{name}" if key else str(name)
            yield from _strings(name, inner)
            yield from _strings(value, inner)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _strings(value, f"{key}[{number}]")
