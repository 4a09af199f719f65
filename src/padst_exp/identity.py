"""What makes two configurations the same run: the keys that change its results.

Works on plain nested containers, as YAML and checkpoints hold them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

# Where and how a run is watched, and what changes no weight: these may change on the way.
FREE = frozenset(
    {
        *("logger", "runs", "resume", "name", "device", "backend", "scale", "arm"),
        *("trainer.workers", "trainer.log_interval", "trainer.checkpoint_interval"),
        *("trainer.eval_interval", "trainer.eval_batch_size", "trainer.keep_last"),
        *("trainer.profile", "trainer.peak_flops", "trainer.parallel"),
    }
)
# Where data and trained weights lie. What the data are is in the checkpoint (`Task.describe`), and
# so are the weights.
LOCATIONS = frozenset(
    {
        *("dataset.root", "dataset.path", "dataset.vocab", "dataset.merges", "model.checkpoint"),
        *("init_from", "init_topology", "init_permutation", "init_values"),
    }
)


def results_part(config: Mapping[Any, object]) -> dict[str, Any]:
    """The part of a training config that determines results."""
    return _without(config, FREE | LOCATIONS)


def name_hash(config: Mapping[Any, object]) -> str:
    """Eight hex digits that change with everything that determines the results of a run.

    Data at another place are other data to it, but not the same place spelt differently.
    """
    places = {
        key: os.path.realpath(os.path.expanduser(value))
        if os.path.exists(os.path.expanduser(value))
        else value
        for key, value in flat(config)
        if key in LOCATIONS and isinstance(value, str)
    }
    return _hash([results_part(config), places])


def replicate_hash(config: Mapping[Any, object]) -> str:
    """Eight hex digits that are equal for runs which differ in nothing but the seed.

    Whose weights, units or permutations a run starts from is told by their places, which are left
    out: that of a seed is another one for each seed.
    """
    return _hash(_without(config, FREE | LOCATIONS | {"seed"}))


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> Iterator[str]:
    """`key=value there and value here` for every key in which two configs differ."""
    before, now = dict(flat(one)), dict(flat(other))
    for key in sorted(before.keys() | now.keys()):
        values = [config.get(key, "(absent)") for config in (before, now)]
        if values[0] != values[1]:
            yield f"{key}={values[0]} there and {values[1]} here"


def flat(config: Mapping[Any, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of a nested config by their dotted keys."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _without(config: Mapping[Any, object], left_out: frozenset[str], prefix: str = "") -> Any:
    return {
        str(key): _without(value, left_out, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else value
        for key, value in config.items()
        if f"{prefix}{key}" not in left_out
    }
