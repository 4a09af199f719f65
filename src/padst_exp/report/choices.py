"""What a stored config chose, in the words of the command line: options of conf/, found again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from padst_exp.config import config_dir, options
from padst_exp.identity import flat

Config = Mapping[Any, Any]
Leaves = Mapping[str, object]

# The keys that tell variants of a structure apart, as tables of results/kernels name them.
_KEYS = {
    "nm": ("group",),
    "block": ("size",),
    "diag": ("bundle", "stride", "width"),
    "fan_in": ("group",),
    "butterfly": ("size",),
    "shuffled_block": ("size",),
}
_ONLY_OF = {"stride": "stride", "width": "band"}
"""Keys of `diag` that say something for one kind of bundle alone."""


def nearest_option(group: str, node: object) -> str:
    """The option of a config group that comes nearest to a part of a config, or "own".

    Constructors have to be the same, those of nested nodes too; of several options with the same
    ones, that of the same `name` (of a model) and with most equal values is taken.
    """
    if not isinstance(node, Mapping):
        return "own"
    found = dict(flat(node))
    targets = _targets(found)
    nearest, most = "own", (False, -1)
    for name, leaves in _files(group).items():
        if _targets(leaves) == targets:
            equal = sum(found.get(key) == value for key, value in leaves.items())
            near = (found.get("name") == leaves.get("name"), equal)
            if near > most:
                nearest, most = name, near
    return nearest


def structure_label(node: object) -> str:
    """A structure with the keys that matter to it, as in `nm group=16`."""
    name = nearest_option("structure", node)
    if not isinstance(node, Mapping):
        return name
    words = [name]
    for key in _KEYS.get(name, ()):
        if node.get("bundle") == _ONLY_OF.get(key, node.get("bundle")) and key in node:
            words.append(f"{key}={node[key]}")
    return " ".join(words)


def structure_of(label: str) -> str:
    """The structure of such a label, without keys."""
    return label.partition(" ")[0]


def _targets(leaves: Leaves) -> dict[str, object]:
    return {key: value for key, value in leaves.items() if key.rpartition(".")[2] == "_target_"}


@cache
def _files(group: str) -> dict[str, Leaves]:
    """The leaves of every option; one that only names another (diag_heur is set) comes after it."""
    loaded = {name: _load(group, name) for name in options(group)}
    aliases = [name for name, (own, _) in loaded.items() if not own]
    order = [*(name for name in loaded if name not in aliases), *aliases]
    return {name: loaded[name][1] for name in order}


def _load(group: str, name: str) -> tuple[bool, Leaves]:
    """Whether a file has keys of its own, and the leaves of it and those that it builds on."""
    content = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text("utf-8"))
    leaves: dict[str, object] = {}
    own = content.get(group, content)
    for base in content.get("defaults", ()):
        if isinstance(base, str) and base != "_self_":
            leaves |= _load(group, base)[1]
    part = {key: value for key, value in own.items() if key not in ("defaults", "sparse")}
    return bool(part), leaves | dict(flat(part))
