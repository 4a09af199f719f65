"""Every number in conf/ that methods read, at values nobody means: it trains, or one line says why.

What trains is not asked how well. A wrong number may diverge, which a run tells in one line too.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import DictConfig, ListConfig, OmegaConf

from dst.small_training import start
from from_yaml import from_yaml, leaf
from padst_exp.config import build, options
from padst_exp.engine.step import DivergedError
from padst_exp.errors import UserError
from padst_exp.structures import NM

GROUPS = "dst", "permutation", "structure", "transform", "optimizer"
WHOLE, BROKEN = (-1, 0, 10**9), (-1.0, 0.0, 1e-9, 1e9, 1e30)
MEANINGLESS = float("nan"), 1e38


def numbers(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a constructor call that has a number, or several, or may have one."""
    for name, value in node.items():
        if isinstance(value, DictConfig):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, ListConfig | int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def extremes(value: Any) -> Iterator[Any]:
    """What to put in the place of a value."""
    if isinstance(value, ListConfig):
        for at, one in enumerate(value):
            for other in extremes(one) if isinstance(one, int | float) else ():
                yield [*value[:at], other, *value[at + 1 :]]
    else:
        yield from WHOLE if isinstance(value, int) else (*BROKEN, *MEANINGLESS)


def cases(group: str) -> Iterator[tuple[str, str, Any]]:
    for option in options(group):
        for key, value in numbers(leaf(f"{group}/{option}")):
            for other in extremes(value):
                yield option, key, other


def made(group: str, option: str, key: str, value: Any) -> Any:
    """What the constructor makes of it; None where one line that names a key refuses it."""
    node = leaf(f"{group}/{option}")
    if "interval" in node:
        node.interval = 2
    OmegaConf.update(node, key, value)
    try:
        return build(node, group)
    except UserError as error:
        assert_named(group, node, error)
        return None


def assert_named(group: str, node: DictConfig, error: UserError) -> None:
    """One line that begins with a key of this node, or of what it has to fit."""
    message = str(error)
    key = message.partition(":")[0].partition("[")[0]
    known = OmegaConf.select(node, key.removeprefix(f"{group}.")) is not None
    assert "\n" not in message and (known or key == "sparsity"), message


@pytest.mark.parametrize("group", GROUPS)
def test_no_number_is_taken_that_means_nothing(group: str) -> None:
    for option, key, value in cases(group):
        several = value if isinstance(value, list) else [value]
        senseless = any(one != one or abs(one) > 1e30 for one in several)
        assert not senseless or made(group, option, key, value) is None, (option, key, value)
        negative = any(one < 0 for one in several)
        assert not negative or made(group, option, key, value) is None, (option, key, value)


@pytest.mark.thorough
@pytest.mark.parametrize("group", ("dst", "permutation", "structure", "optimizer"))
def test_what_is_taken_trains(group: str) -> None:
    homes = {"srigl": ("fan_in", {"group": 1}), "dsb": ("shuffled_block", {"size": 4})}
    for option, key, value in cases(group):
        found = made(group, option, key, value)
        if found is None:
            continue
        settings: dict[str, Any] = {
            "dst": from_yaml("dst/rigl", interval=2),
            "structure": NM(n=1, m=None, group=4),
            "permutation": from_yaml("permutation/none"),
            "optimizer": from_yaml("optimizer/adamw"),
        }
        if group == "dst" and option in homes:
            home, changes = homes[option]
            settings["structure"] = from_yaml(f"structure/{home}", **changes)
        settings[group] = found
        try:
            start(
                settings["dst"], settings["structure"], steps=8, learner=settings["permutation"],
                optimizer=settings["optimizer"],
            ).run(8)  # fmt: skip
        except UserError as error:
            assert_named(group, leaf(f"{group}/{option}"), error)
        except DivergedError:
            continue
        except Exception as error:
            raise AssertionError(f"{group}={option} {group}.{key}={value}") from error
