"""`build` calls constructors with exactly what they ask for."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from padst_exp.config import build
from padst_exp.errors import UserError


class Inner:
    def __init__(self, *, rate: float) -> None:
        self.rate = rate

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inner) and other.rate == self.rate

    def __hash__(self) -> int:
        return hash(self.rate)


class Outer:
    def __init__(
        self,
        *,
        count: int,
        rate: float = 0.5,
        flag: bool = False,
        mode: Literal["a", "b", 1] = "a",
        maybe: int | None = None,
        pair: tuple[float, float] = (0.0, 0.0),
        names: Sequence[str] = (),
        table: Mapping[str, float] | None = None,
        inner: Inner | None = None,
    ) -> None:
        self.given = dict(locals())


def failing(*, message: str) -> None:
    raise UserError(message)


def node(_target_: str = "Outer", **values: object) -> Any:
    return OmegaConf.create({"_target_": f"{__name__}.{_target_}", **values})


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"count": 3}, "count", 3),
        ({"count": 3, "rate": 1}, "rate", 1.0),
        ({"count": 3, "mode": 1}, "mode", 1),
        ({"count": 3, "maybe": None}, "maybe", None),
        ({"count": 3, "pair": [0, 0.5]}, "pair", (0.0, 0.5)),
        ({"count": 3, "names": ["x"]}, "names", ["x"]),
        ({"count": 3, "table": {"x": 1}}, "table", {"x": 1.0}),
        ({"count": 3, "inner": node("Inner", rate=1)}, "inner", Inner(rate=1.0)),
    ],
)
def test_values_arrive(values: dict[str, object], name: str, expected: object) -> None:
    given = build(node(**values), "group").given[name]
    assert given == expected
    assert type(given) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "group.count: missing, expected int"),
        ({"count": "???"}, "group.count: missing, expected int"),
        ({"count": "abc"}, "group.count: expected int, got 'abc'"),
        ({"count": "3"}, "group.count: expected int, got '3'"),
        ({"count": 1.5}, "group.count: expected int, got 1.5"),
        ({"count": 1.0}, "group.count: expected int, got 1.0"),
        ({"count": True}, "group.count: expected int, got True"),
        ({"count": None}, "group.count: expected int, got None"),
        ({"count": 1, "rate": "0.1"}, "group.rate: expected float, got '0.1'"),
        ({"count": 1, "rate": True}, "group.rate: expected float, got True"),
        ({"count": 1, "flag": 1}, "group.flag: expected bool, got 1"),
        ({"count": 1, "mode": "c"}, "group.mode: expected a or b or 1, got 'c'"),
        ({"count": 1, "maybe": "x"}, "group.maybe: expected int or null, got 'x'"),
        ({"count": 1, "pair": [1]}, "group.pair: expected tuple[float, float], got [1]"),
        ({"count": 1, "names": "x"}, "group.names: expected Sequence[str], got 'x'"),
        ({"count": 1, "cuont": 1}, "group.cuont: unknown key; did you mean count?"),
        (
            {"count": 1, "inner": {"rate": 1}},
            "group.inner: expected Inner or null, got {'rate': 1}",
        ),
        (
            {"count": 1, "inner": node("Inner", rate="x")},
            "group.inner.rate: expected float, got 'x'",
        ),
        ({"count": 1, "inner": node(count=1)}, "group.inner: expected Inner or null, got Outer"),
    ],
)
def test_mistakes_are_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(node(**values), "group")
    assert str(error.value) == message


def test_an_unknown_key_without_a_near_one_lists_all() -> None:
    with pytest.raises(UserError, match=r"^group.zzz: unknown key; known: count, flag, inner, "):
        build(node(count=1, zzz=1), "group")


@pytest.mark.parametrize("target", ["padst_exp.errors.Nope", "padst_exp.nope.Nope", "Nope"])
def test_targets_must_exist(target: str) -> None:
    with pytest.raises(UserError, match=r"^group[:._]"):
        build(OmegaConf.create({"_target_": target}), "group")


def test_a_group_needs_a_target() -> None:
    with pytest.raises(UserError, match=r"^group: expected a mapping with a _target_"):
        build(OmegaConf.create({"count": 1}), "group")


def test_extra_parameters_are_passed_and_belong_to_the_data() -> None:
    assert build(node(), "group", {"count": 7}).given["count"] == 7
    with pytest.raises(UserError, match=r"^group\.count: follows from the data set; remove it$"):
        build(node(count=7), "group", {"count": 7})
    with pytest.raises(UserError, match=r"^group: .*Outer does not fit .* it has no pixels$"):
        build(node(), "group", {"count": 7, "pixels": 3})


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("too small", "group: too small"),
        ("group.message: too small", "group.message: too small"),
        ("group.message=3: too small", "group.message=3: too small"),
    ],
)
def test_errors_of_constructors_name_their_group(said: str, heard: str) -> None:
    with pytest.raises(UserError) as error:
        build(node("failing", message=said), "group")
    assert str(error.value) == heard
