"""From YAML to objects: checked keys, strict constructor calls, and the name of a run.

Imports neither torch nor anything that does, so that `--help` answers at once.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from padst_exp import identity
from padst_exp.errors import UserError, require
from padst_exp.targets import HOMES, find, keyword_parameters

# Of a training; each is one constructor call, made by `build`.
GROUPS = tuple(HOMES)

# What things are computed in are float32, which must hold quotients of these too, and int64.
LARGEST_FLOAT, LARGEST_INT = 1e30, 2**63 - 1
# Besides control characters, bytes of the command line that are no letters in this locale.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

Device = Literal["auto", "cpu", "cuda"]
Keys = TypeVar("Keys")


def require_sparsity(key: str, value: float) -> None:
    """Raise a `UserError` that names `key` unless `value` is a share of zeros."""
    require(0 <= value < 1, key, value, "a number in [0, 1)")


def config_dir() -> Path:
    """The folder of YAML files: inside the wheel, or conf/ of the checkout."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "conf", here.parents[1] / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no conf/config.yaml beside {here}")


def options(group: str) -> list[str]:
    """What may be chosen in a group; names that begin with _ are parts of other files."""
    folder = config_dir() / group
    paths = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return sorted(
        path.as_posix() for path in paths if not any(part[0] == "_" for part in path.parts)
    )


def option_node(path: str, /, **changes: Any) -> DictConfig:
    """The constructor call of an option, e.g. "dst/rigl", as `option` makes it.

    Raises:
        UserError: there is no such option.
    """
    group, _, name = path.partition("/")
    require(group in GROUPS, "option", path, f"<group>/<option>, a group of {', '.join(GROUPS)}")
    file = config_dir() / group / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"{group}: there is no {name!r}{closest(name, options(group))}")
    tree = OmegaConf.load(file)
    assert isinstance(tree, DictConfig)
    bases = [x for x in tree.pop("defaults", []) if isinstance(x, str) and x != "_self_"]
    parts = [option_node(f"{group}/{base}") for base in bases]
    call = OmegaConf.merge(*parts, tree.get(group, tree), changes)
    assert isinstance(call, DictConfig)
    return call


def option(path: str, /, **changes: Any) -> Any:
    """What an option of a group is on the command line, as an object.

    Args:
        path: group and option, e.g. "dst/rigl" or "structure/diag".
        changes: keys that differ from those of its YAML file, e.g. `interval=10`.

    Raises:
        UserError: no such option, an unknown key, or a value that is none for it.
    """
    return build(option_node(path, **changes), path.partition("/")[0])


def read_keys(cfg: DictConfig, schema: type[Keys], groups: Collection[str] = ()) -> Keys:
    """The keys of an entry point, checked as `build` checks those of a constructor.

    Args:
        cfg: its composed config.
        schema: dataclass with one annotated field for each key, and without defaults.
        groups: keys that are constructor calls, and left to `build`.

    Raises:
        UserError: in one line that names the key.
    """
    own = OmegaConf.masked_copy(cfg, [str(name) for name in cfg if name not in groups])
    return schema(**_arguments(schema, _values(own), "", {}))


def build(node: DictConfig, key: str, extra: Mapping[str, object] | None = None) -> Any:
    """Call the constructor that `node._target_` names with the other keys of `node`.

    Constructors are keyword-only and annotated. Every key must be a parameter, every parameter
    without a default must be given, and every value must already have the annotated type: an int
    is a float, a list is a tuple, but "3", True and 3.0 are no int. Nested nodes that have a
    `_target_` are built first.

    Args:
        node: one config group, e.g. `cfg.structure`.
        key: its dotted key, for messages, e.g. "structure".
        extra: parameters that follow from other choices (the model's shape from the data).

    Returns:
        What the constructor returns.

    Raises:
        UserError: in one line that names the dotted key.
    """
    target = resolve_target(node, key)
    extra = extra or {}
    require_fit(node, key, extra)
    values = _values(node)
    del values["_target_"]
    arguments = _arguments(target, values, f"{key}.", extra)
    try:
        return target(**arguments)
    except UserError as error:
        message, group = str(error), key.partition(".")[0]
        named = message.startswith((f"{group}.", f"{group}:"))
        raise UserError(message if named else f"{key}: {message}") from error


def require_fit(node: DictConfig, key: str, names: Collection[str]) -> None:
    """Raise a `UserError` unless a constructor takes all that follows from the data set."""
    unfit = [name for name in names if name not in keyword_parameters(resolve_target(node, key))]
    if unfit:
        raise UserError(
            f"{key}: {node._target_} does not fit the data set, which gives {', '.join(names)}; "
            f"it has no {', '.join(unfit)}"
        )


def resolve_target(node: DictConfig, key: str) -> Callable[..., object]:
    """The constructor that `node._target_` names."""
    path = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(path, str) or "." not in path:
        raise UserError(f"{key}: expected a mapping with a _target_, got {node!r}")
    try:
        target = find(path)
        keyword_parameters(target)
    except ValueError as error:
        raise UserError(f"{key}._target_: {error}") from error
    return target


def closest(name: str, known: Iterable[str]) -> str:
    """A hint to append to "unknown": the likeliest spelling, else all of them."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1)
    if matches:
        return f"; did you mean {matches[0]}?"
    return f"; known: {', '.join(names)}" if names else "; there is none to set"


def results_config(cfg: DictConfig) -> dict[str, Any]:
    """The part of a training config that determines results, as plain resolved containers."""
    return identity.results_part(_resolved(cfg))


def config_hash(cfg: DictConfig) -> str:
    """Eight hex digits that change with everything that determines the results of a run."""
    return identity.name_hash(_resolved(cfg))


def _resolved(cfg: DictConfig) -> dict[Any, Any]:
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return container


def run_name(cfg: DictConfig, choices: Mapping[str, str | None]) -> str:
    """The name of the run directory: `name` if set, else what was chosen and the config's hash.

    Args:
        cfg: composed training config.
        choices: the option chosen in each group (`HydraConfig.get().runtime.choices`).
    """
    if cfg.name is not None:
        return str(cfg.name)
    groups = ("model", "structure", "dst", "permutation")
    chosen = [str(choices[group]) for group in groups]
    return "-".join([*chosen, f"s{cfg.sparsity:g}", f"seed{cfg.seed}", config_hash(cfg)])


def _values(node: DictConfig) -> dict[str, object]:
    """The keys of a node that have a value."""
    values = cast(dict[object, object], OmegaConf.to_container(node, resolve=True))
    return {str(k): v for k, v in values.items() if v != "???"}


def _arguments(
    target: Callable[..., object],
    values: Mapping[str, object],
    prefix: str,
    extra: Mapping[str, object],
) -> dict[str, Any]:
    """All arguments of a call: `values`, checked, and `extra`."""
    parameters = keyword_parameters(target)
    for name in values:
        if name in extra:
            raise UserError(f"{prefix}{name}: follows from the data set; remove it")
        if name not in parameters:
            raise UserError(f"{prefix}{name}: unknown key{closest(name, parameters)}")
    arguments = dict(extra)
    for name, parameter in parameters.items():
        if name in values:
            arguments[name] = _argument(values[name], f"{prefix}{name}", parameter.annotation)
        elif name not in extra and parameter.default is parameter.empty:
            wanted = _description(parameter.annotation)
            raise UserError(f"{prefix}{name}: missing, expected {wanted}")
    return arguments


def _require_meaning(value: object, key: str) -> None:
    """Refuse what means nothing for any key, at any depth of its value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _require_meaning(str(name), key)
            _require_meaning(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _require_meaning(inner, f"{key}[{index}]")
    elif isinstance(value, str):
        require(not _CONTROL.search(value), key, ascii(value), "text without control characters")
    elif isinstance(value, float):
        # NaN is none either.
        require(abs(value) <= LARGEST_FLOAT, key, value, "a finite number of at most 1e30")
    elif isinstance(value, int):
        require(abs(value) <= LARGEST_INT, key, value, "an integer of at most 2^63 - 1")


def _argument(value: object, key: str, annotation: Any) -> object:
    _require_meaning(value, key)
    adapter = TypeAdapter[object](annotation, config=ConfigDict(arbitrary_types_allowed=True))
    got = repr(value)
    try:
        if isinstance(value, dict) and "_target_" in value:
            built = build(OmegaConf.create(value), key)
            got = type(built).__name__
            return adapter.validate_python(built, strict=True)
        # Strict JSON sees types as YAML does: a list is a tuple, but no string is a number.
        return adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise UserError(f"{key}: expected {_description(annotation)}, got {got}") from error


def _description(annotation: Any) -> str:
    """A type as a user of YAML reads it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if is_dataclass(annotation):
        keys = (f"{field.name}: {_description(field.type)}" for field in fields(annotation))
        return f"{{{', '.join(keys)}}}"
    if origin is Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_description(argument) for argument in arguments)
    if origin is None:
        return getattr(annotation, "__name__", str(annotation))
    inside = ", ".join("..." if item is ... else _description(item) for item in arguments)
    return f"{origin.__name__}[{inside}]"
