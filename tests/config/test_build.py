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


def mistake(call: Any, extra: Mapping[str, object] | None = None) -> str:
    with pytest.raises(UserError) as error:
        build(call, "group", extra)
    return str(error.value)


def test_values_arrive() -> None:
    cases: list[tuple[str, object, object]] = [
        ("count", 4, 4),
        ("rate", 1, 1.0),
        ("mode", 1, 1),
        ("maybe", None, None),
        ("pair", [0, 0.5], (0.0, 0.5)),
        ("names", ["x"], ["x"]),
        ("table", {"x": 1}, {"x": 1.0}),
        ("inner", node("Inner", rate=1), Inner(rate=1.0)),
    ]
    for name, value, expected in cases:
        given = build(node(**{"count": 3, name: value}), "group").given[name]
        assert given == expected
        assert type(given) is type(expected), name


def test_mistakes_are_one_line() -> None:
    cases: dict[str, dict[str, object]] = {
        "group.count: missing, expected int": {},
        "group.count: expected int, got 'abc'": {"count": "abc"},
        "group.count: expected int, got '3'": {"count": "3"},
        "group.count: expected int, got 1.5": {"count": 1.5},
        "group.count: expected int, got 1.0": {"count": 1.0},
        "group.count: expected int, got True": {"count": True},
        "group.count: expected int, got None": {"count": None},
        "group.rate: expected float, got '0.1'": {"rate": "0.1"},
        "group.rate: expected float, got True": {"rate": True},
        "group.flag: expected bool, got 1": {"flag": 1},
        "group.mode: expected a or b or 1, got 'c'": {"mode": "c"},
        "group.maybe: expected int or null, got 'x'": {"maybe": "x"},
        "group.pair: expected tuple[float, float], got [1]": {"pair": [1]},
        "group.names: expected Sequence[str], got 'x'": {"names": "x"},
        "group.cuont: unknown key; did you mean count?": {"cuont": 1},
        "group.inner: expected Inner or null, got {'rate': 1}": {"inner": {"rate": 1}},
        "group.inner.rate: expected float, got 'x'": {"inner": node("Inner", rate="x")},
        "group.inner: expected Inner or null, got Outer": {"inner": node(count=1)},
    }
    for message, values in cases.items():
        assert mistake(node(**{"count": 1} | values if values else {})) == message
    assert mistake(node(count="???")) == "group.count: missing, expected int"


def test_an_unknown_key_without_a_near_one_lists_all() -> None:
    assert mistake(node(count=1, zzz=1)).startswith("group.zzz: unknown key; known: count, flag, ")


def test_targets_must_exist() -> None:
    for target in ("padst_exp.errors.Nope", "padst_exp.nope.Nope"):
        assert mistake(OmegaConf.create({"_target_": target})).startswith("group._target_: ")
    for call in ({"_target_": "Nope"}, {"count": 1}):
        wanted = "group: expected a mapping with a _target_, got "
        assert mistake(OmegaConf.create(call)).startswith(wanted)


def test_extra_parameters_are_passed_and_belong_to_the_data() -> None:
    assert build(node(), "group", {"count": 7}).given["count"] == 7
    follows = mistake(node(count=7), {"count": 7})
    assert follows == "group.count: follows from the data set; remove it"
    unfit = mistake(node(), {"count": 7, "pixels": 3})
    assert "Outer does not fit the data set" in unfit and unfit.endswith("it has no pixels")


def test_errors_of_constructors_name_their_group() -> None:
    for said, heard in {
        "too small": "group: too small",
        "group.message: too small": "group.message: too small",
    }.items():
        assert mistake(node("failing", message=said)) == heard
