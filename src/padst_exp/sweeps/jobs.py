"""Which runs a sweep consists of: arms times whatever else is listed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, OmegaConf

from padst_exp.config import closest, config_dir
from padst_exp.errors import UserError, require


@dataclass(frozen=True)
class Source:
    """Another run of the same sweep, which one starts from.

    Args:
        arm: of that run; all that is swept besides is the same.
        shift: by how much its seed is higher.
    """

    arm: str
    shift: int = 0


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        arm: its name in the experiment, if that has arms.
        swept: its values of what the sweep lists besides arms and seeds, by key.
        overrides: that compose its config, on top of conf/config.yaml.
        starts_from: runs that have to be finished before, by the key that is to hold their folder.
    """

    arm: str | None
    swept: dict[str, Any]
    overrides: list[str]
    starts_from: dict[str, Job] = field(default_factory=dict)


def jobs(overrides: Sequence[str]) -> list[Job]:
    """The runs that `python -m padst_exp.train -m` makes of `overrides`.

    Args:
        overrides: as on the command line, e.g. `["experiment=structures", "seed=range(10)"]`.

    Raises:
        UserError: as `expand`.
        HydraException: they cannot be composed.
    """
    with _hydra():
        loader = GlobalHydra.instance().config_loader()
        return jobs_of(
            overrides,
            lambda single: hydra_compose("config", single, return_hydra_config=True),
            OverridesParser.create(config_loader=loader),
        )


def jobs_of(
    arguments: Sequence[str], load: Callable[[list[str]], DictConfig], parser: OverridesParser
) -> list[Job]:
    """The runs of each experiment that is listed, `experiment=glob(*)` being all.

    Args:
        arguments: of the command line.
        load: composes overrides without lists to a config with its hydra node.
        parser: of overrides.

    Raises:
        UserError: as `expand`.
    """
    axes = _axes(arguments, parser)
    found: list[Job] = []
    for experiment in axes.pop("experiment", [None]):
        chosen = [] if experiment is None else [experiment]
        single = [options[0] for key, options in axes.items() if key != "arm"]
        sweeper = load([*chosen, *single]).hydra.sweeper
        listed = OmegaConf.to_container(sweeper, resolve=True)
        assert isinstance(listed, dict)
        given = [argument for argument in arguments if not argument.startswith("experiment=")]
        found += expand(listed["params"] or {}, listed["arms"], [*chosen, *given])
    return found


def compose(overrides: Sequence[str]) -> DictConfig:
    """The config of one run."""
    with _hydra():
        return hydra_compose("config", list(overrides))


def expand(
    params: Mapping[str, object],
    arms: Mapping[str, Mapping[str, object]],
    arguments: Sequence[str],
) -> list[Job]:
    """All combinations of arms with what `params` and `arguments` list, seed by seed.

    An argument takes the place of the same key in `params`; `arm=<name>,<name>` picks arms. Where
    an arm has a key of `params` too, it takes part with its own value alone, or with those values
    of its own list that are asked for; null: it has no such key.

    Args:
        params: what an experiment lists, by key, as on the command line: `0.8,0.9`.
        arms: overrides by key, for each arm. A mapping instead of a value, `{arm: learned}` or
            `{arm: learned, shift: 1}`, is the folder of another run, see `Source`.
        arguments: of the command line.

    Raises:
        UserError: there is no such arm, or the command line contradicts it.
    """
    given = _axes(arguments)
    axes = {**_axes(f"{key}={values}" for key, values in params.items()), **given}
    names = [_value(option) for option in axes.pop("arm", [])] or [*arms] or [None]
    for name in names:
        known = name in arms or not arms
        require(known, "arm", name, f"one of the experiment's{closest(str(name), arms)}")
    listed = [key for key in axes if key in params or len(axes[key]) > 1]
    order = sorted(axes, key=lambda key: key != "seed")
    found: dict[tuple[str, ...], Job] = {}
    for values in itertools.product(*(axes[key] for key in order)):
        chosen = dict(zip(order, values, strict=True))
        for name in names:
            job = _job(name, chosen, params, arms, listed)
            if job is not None:
                found.setdefault((str(name), *job.overrides), job)
    return list(found.values())


def _job(
    name: str | None,
    chosen: Mapping[str, str],
    params: Mapping[str, object],
    arms: Mapping[str, Mapping[str, object]],
    listed: Sequence[str],
) -> Job | None:
    """The run of one arm for one choice of all else, `{key: override}`; None: it has no part."""
    overrides, starts_from = dict(chosen), {}
    for key, value in ({} if name is None else arms.get(name, {})).items():
        if isinstance(value, Mapping):
            source = Source(**value)
            require(source.arm in arms, f"arms.{name}.{key}.arm", source.arm, "an arm")
            seed = int(_value(chosen.get("seed", "seed=0"))) + source.shift
            there = _job(source.arm, {**chosen, "seed": f"seed={seed}"}, params, arms, listed)
            if there is None:
                return None
            starts_from[key] = there
            continue
        if key in params and value is None:
            del overrides[key]
            continue
        if key in params and isinstance(value, list):
            if _value(overrides[key]) not in value:
                return None
            continue
        own = f"{key}={_element(value)}"
        if key not in params and overrides.get(key, own) != own:
            raise UserError(f"{overrides[key]}: arm={name} has {own}, expected no other value")
        overrides[key] = own
    swept = {key: _value(overrides[key]) for key in listed if key in overrides and key != "seed"}
    arm = [] if name is None else [f"arm={name}"]
    return Job(name, swept, [*arm, *overrides.values()], starts_from)


def _axes(arguments: Iterable[str], parser: OverridesParser | None = None) -> dict[str, list[str]]:
    """What each key may be, as overrides with one value each."""
    axes = {}
    for override in (parser or OverridesParser.create()).parse_overrides(list(arguments)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [str(override.input_line)]
        elif override.is_discrete_sweep():
            axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise UserError(f"{override.input_line}: expected a list of values")
    return axes


def _value(override: str) -> Any:
    return OverridesParser.create().parse_override(override).value()


def _element(value: object) -> str:
    """A value as the command line has it."""
    if isinstance(value, list):
        return f"[{','.join(map(_element, value))}]"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)


@contextmanager
def _hydra() -> Iterator[None]:
    """A block in which Hydra composes from conf/, whatever it has been set up for outside."""
    outside = get_gh_backup()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            yield
    finally:
        restore_gh_from_backup(outside)
