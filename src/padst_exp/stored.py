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

from padst_exp.config import closest
from padst_exp.errors import UserError
from padst_exp.messages import say
from padst_exp.targets import HOMES, foreign

MOST_BYTES, DEEPEST = 1 << 20, 20
FRESH: Mapping[str, Any] = {
    "init_from": None,
    "init_score": "magnitude",
    "init_batches": 1,
    "init_topology": None,
    "init_permutation": None,
    "init_values": None,
}
"""The keys of a run that starts from nothing else."""

# What may still be changed of a trained run: keys, and all keys of a group. None changes a weight.
FREE = ("dataset.*", "trainer.*", "logger.*", "backend")
# Why other keys cannot, where the value that the run was trained with does not say it.
_REASONS = {
    **dict.fromkeys(("runs", "name"), "run= names the folder of the run"),
    "resume": "no training goes on",
    "device": "this command has a key of that name itself",
    **dict.fromkeys(
        (*FRESH, "model.checkpoint", "model.pretrained"),
        "the weights of a run lie in its checkpoint",
    ),
    **dict.fromkeys((*HOMES, "experiment", "debug", "recipe"), "the run was composed before"),
}


def parse(text: str) -> DictConfig:
    """A training config as `train` wrote it.

    Raises:
        ValueError, YAMLError, OmegaConfBaseException: it is none, or wants something resolved.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text)} characters")
    _require_modest(text)
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


def change(cfg: DictConfig, overrides: Sequence[str]) -> set[str]:
    """Give `cfg` other values of keys that change no weight: where the data are now, above all.

    Args:
        cfg: from `parse`, changed in place.
        overrides: as on a command line, e.g. `dataset.root=/data`. The user's own word: they may
            be interpolations.

    Returns:
        The keys that were given.

    Raises:
        UserError: such a key belongs to the training that was, or is no single key.
        HydraException: one that cannot be read.
    """
    changed = set()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, _value(override)
        group, dot, _ = key.partition(".")
        if dot == "" and f"{group}.*" in FREE:
            raise UserError(f"{key}: expected one of its keys, as in {key}.key=value, got {value}")
        if key not in FREE and f"{group}.*" not in FREE:
            _require_as_trained(cfg, key, value)
            continue
        try:
            OmegaConf.update(cfg, key, value, merge=False)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{key}: cannot be {value}: {reason}") from error
        changed.add(key)
    return changed


def _require_as_trained(cfg: DictConfig, key: str, value: object) -> None:
    """Refuse a key that was decided with the training, unless it is as it was then."""
    *above, name = key.split(".")
    node = OmegaConf.select(cfg, ".".join(above)) if above else cfg
    known = node if isinstance(node, DictConfig) else {}
    if key not in _REASONS and name not in known:
        raise UserError(f"{key}: unknown key{closest(name, map(str, known))}")
    then = known.get(name)
    if then == value:
        return
    if key in _REASONS:
        wanted = f"nothing, since {_REASONS[key]}"
    else:
        wanted = f"{'null' if then is None else then}, with which the run was trained"
    raise UserError(
        f"{key}: expected {wanted}, got {'null' if value is None else value}; what may still be "
        f"changed is {', '.join(FREE)}"
    )


def _require_modest(text: str) -> None:
    """Refuse YAML of which a little text stands for any amount of memory or time."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
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
