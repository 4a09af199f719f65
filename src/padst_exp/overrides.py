"""What stands on the command line, before Hydra composes a config of it, and how to quote it."""

import re
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from padst_exp.config import closest, config_dir, options
from padst_exp.errors import UserError

LONGEST_NAME = 256  # of a file


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would take without a word, or refuse without naming it.

    That is a key without a name, and a group that is given anything but the name of one of its
    files: a mapping or a list would be merged into it, a path is a file under another name.

    Args:
        arguments: of the command line; options, which begin with a dash, are left to Hydra.

    Raises:
        OverrideParseException: an argument cannot be read.
        UserError: in one line that names the group, or says that the letters cannot be read.
    """
    parser = OverridesParser.create()
    for argument in arguments:
        _require_letters(argument)
        if argument.startswith("-") or not ("=" in argument or argument[:1] in ("+", "~")):
            continue
        (override,) = parser.parse_overrides([argument])
        if not override.key_or_group:
            raise OverrideParseException(argument, "no key")
        if not override.is_delete() and _is_group(override.key_or_group):
            for choice in _choices(override):
                _require_option(override.key_or_group, choice)


def check_options(
    arguments: Sequence[str], own: Collection[str], others: Mapping[str, str | None]
) -> None:
    """Refuse options of another program, naming what does the same here, and keys with dashes.

    Args:
        arguments: of the command line.
        own: keys.
        others: names of the other program, without dashes, and the own keys for them.

    Raises:
        UserError: in one line.
    """
    for argument in arguments:
        given, dashed = argument.partition("=")[0], argument.startswith("-")
        name = given.lstrip("-").replace("-", "_")
        if name in others and (dashed or name not in own):
            ours = others[name]
        elif dashed and name in own:
            ours = name
        else:
            continue
        what = "unknown option, expected key=value" if dashed else "unknown key"
        hint = "nothing here does that" if ours is None else f"did you mean {ours}?"
        raise UserError(f"{given}: {what}; {hint}")


def _require_letters(argument: str) -> None:
    """Refuse bytes that are no letters where this process reads them."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(not_letters(argument)) from None


def not_letters(text: str) -> str:
    """One line about text that cannot be the name of a file for this process."""
    known = sys.getfilesystemencoding()
    shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    hint = "" if known == "utf-8" else "; with PYTHONUTF8=1 Python reads UTF-8"
    return f"{shown}: expected letters in {known}{hint}"


def _is_group(key: str) -> bool:
    folder = config_dir() / key
    return key.partition("/")[0] != "hydra" and "." not in key and folder.is_dir()


def _choices(override: Override) -> Iterable[Any]:
    """What a group is to be: one value, or each one of a sweep that lists them."""
    if override.is_sweep_override():
        sweep = override.value()
        return sweep.list if isinstance(sweep, ChoiceSweep) else ()
    return [override.value()]


def _require_option(group: str, choice: object) -> None:
    known = ", ".join(options(group))
    if not isinstance(choice, str):
        got = "null" if choice is None else choice
        raise UserError(f"{group}: expected one of {known}, got {got}")
    parts = choice.split("/")
    named = not any(part in ("", ".", "..") or part[0] == "_" for part in parts)
    named = named and len(choice.encode()) < LONGEST_NAME
    if not named or choice.endswith((".yaml", ".yml")) or "${" in choice:
        raise UserError(f"{group}={choice}: unknown option; choose from {known}")


def check_hydra(node: DictConfig, key: str = "hydra") -> None:
    """Refuse keys of Hydra that it does not have; `+hydra.x=1` adds them without a word.

    Args:
        node: Hydra's part of a composed config, or a part of that.
        key: its dotted key.

    Raises:
        UserError: in one line that names the key.
    """
    kind = OmegaConf.get_type(node)
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else {str(n) for n in node}
    for name in map(str, node):
        # Hydra itself adds this one, from a group of its own.
        if name not in known and f"{key}.{name}" != "hydra.env":
            raise UserError(f"{key}.{name}: unknown key{closest(name, known)}")
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none():
            check_hydra(inner, f"{key}.{name}")


def unreadable(argument: str) -> str:
    """One line about an argument that Hydra cannot read, with the quoted form that it can."""
    key, equals, value = argument.partition("=")
    if equals and re.fullmatch(r"[+~]{0,2}[\w.@/-]+", key, re.ASCII) and value.strip():
        return f"{argument}: cannot be read; quoted it can: {quoted(key, value)}"
    return f"{argument}: cannot be read, expected key=value"


def ambiguous(argument: str) -> str:
    """One line about an argument that lists several values where one is expected."""
    key, _, value = argument.partition("=")
    return (
        f"{argument}: several values are a sweep, which -m makes; "
        f"one value with a comma is quoted: {quoted(key, value)}"
    )


def quoted(key: str, value: str) -> str:
    """An argument that gives `key` the text `value`, letter by letter, as one types it in a shell.

    Hydra wants its own quotes inside of those of the shell.
    """
    return shlex.quote(assignment(key, value))


def assignment(key: str, value: str) -> str:
    """The same for Hydra alone."""
    # Backslashes before a quote, or at the end, are doubled, as Hydra's grammar has it.
    inner = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return f'{key}="{inner}"'
