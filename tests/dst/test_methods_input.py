"""What cannot be done is told in one line: the key, what would be right, and what was given."""

from typing import Any

import pytest

from dst.small_training import adamw, start
from from_yaml import from_yaml
from padst_exp.errors import UserError
from padst_exp.structures import Block, Butterfly, Diagonal, FanIn, Unstructured

SHARE = "a share of training in (0, 1]"
SETTINGS: list[tuple[str, str, Any, str]] = [
    ("set", "fraction", 2.0, "a share in [0, 1]"),
    ("set", "interval", 0, "at least 1 step"),
    ("rigl", "stop", 1.5, "a share of training in [0, 1]"),
    ("rigl", "moments", "new", "age or zero"),
    ("mest", "drop.gradient", -1.0, "at least 0"),
    ("mest_ems", "counts.extra", 0.0, "a positive share of the active units"),
    ("mest_ems", "counts.end", 0.0, SHARE),
    ("gmp", "counts.start", 0.0, "a density in (0, 1]"),
    ("gmp", "counts.begin", 1.0, "a share of training in [0, 1)"),
    ("gmp", "counts.end", 1.2, "a share of training in (0.0, 1]"),
    (
        "granet",
        "stop",
        0.5,
        "at least dst.counts.end=0.6, so that the last update reaches the density asked",
    ),
    ("chtss", "counts.steepness", 0.0, "from 0.001 (a straight line) to 1000 (a step)"),
    ("chtss", "counts.steepness", 1e9, "from 0.001 (a straight line) to 1000 (a step)"),
    ("chtss", "drop.end", 1e9, "at most 1000 (the smallest leave for certain)"),
    ("chts", "drop.start", -1.0, "at least 0 (any unit may leave)"),
    ("chts", "drop.end", 0.5, "at least dst.drop.start=1.0"),
    ("srigl", "gamma", -0.1, "a share of the fan-in in [0, 1]"),
    ("srigl", "gamma", 1.5, "a share of the fan-in in [0, 1]"),
    ("dsb", "fraction", -1.0, "a share in [0, 1]"),
    (
        "dynadiag",
        "final_temperature",
        0.6,
        "positive and at most 0.5, so that the top-k is hard in the end",
    ),
    (
        "dynadiag",
        "final_temperature",
        0.0,
        "positive and at most 0.5, so that the top-k is hard in the end",
    ),
    ("dynadiag", "temperature", 0.0001, "at least dst.final_temperature=0.001"),
    ("dynadiag", "schedule", "step", "cosine or linear or constant"),
    ("dynadiag", "freeze", 0.0, SHARE),
    ("dynadiag", "l1", -1.0, "at least 0"),
    ("dynadiag", "lr", 0.0, "positive"),
    ("dynadiag", "interval", 0, "at least 1 step"),
    ("sr_ste", "decay", -1.0, "at least 0"),
    ("sr_ste", "freeze", 0.0, SHARE),
    ("top_kast", "backward", 0.0, "a density in (0, 1]"),
    ("top_kast", "interval", 0, "at least 1 step"),
]


def told(work: Any) -> str:
    with pytest.raises(UserError) as error:
        work()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_settings_out_of_range() -> None:
    for name, key, value, wanted in SETTINGS:
        outer, _, inner = key.partition(".")
        changes = {outer: {inner: value} if inner else value}
        message = told(lambda name=name, changes=changes: from_yaml(f"dst/{name}", **changes))
        shown = repr(value) if isinstance(value, str) else value
        assert message == f"dst.{key}: expected {wanted}, got {shown}"


def test_methods_on_structures_they_cannot_serve() -> None:
    diagonals = Diagonal(bundle=1, stride=16, width=16)
    for name, structure, wanted in [
        ("srigl", Block(size=8, balanced=True), "fan_in, whose pools are neurons,"),
        ("srigl", Unstructured(), "fan_in, whose pools are neurons,"),
        ("dsb", FanIn(group=8), "shuffled_block"),
        (
            "chts",
            diagonals,
            "one whose units have a row and a column each, such as unstructured,",
        ),
    ]:
        algorithm = from_yaml(f"dst/{name}")
        message = told(lambda a=algorithm, s=structure: start(a, s, steps=1))
        assert message == (
            f"structure: expected {wanted} as this dst needs, got {type(structure).__name__} "
            "(layer 0.weights.0)"
        )


def test_a_butterfly_holds_no_more_than_its_pattern() -> None:
    assert told(lambda: Butterfly(size=8).geometry(128, 128, 0.5)) == (
        "sparsity: expected at least 0.6875, all that a butterfly of 16x16 cells holds of a "
        "128x128 weight (or a smaller structure.size), got 0.5"
    )
    assert told(lambda: from_yaml("structure/butterfly", size=0)).startswith("structure.size: ")
    assert told(lambda: from_yaml("structure/shuffled_block", size=0)).startswith("structure.size")


def test_a_warm_up_of_what_is_grown_needs_births() -> None:
    algorithm, optimizer = from_yaml("dst/rigl", moments="zero"), adamw(regrowth_warmup=5)
    message = told(lambda: start(algorithm, Unstructured(), steps=4, optimizer=optimizer))
    assert message == (
        "optimizer.regrowth_warmup: expected 0 with dst.moments=zero, which keeps no births, got 5"
    )
    assert told(lambda: adamw(regrowth_warmup=-1)) == (
        "optimizer.regrowth_warmup: expected at least 0 steps, got -1"
    )


def test_a_unit_larger_than_the_weight_names_what_makes_it_smaller() -> None:
    for structure, wanted in (
        (Block(size=1000, balanced=False), "use a smaller structure.size"),
        (Diagonal(bundle="band", stride=1, width=1000), "use a smaller structure.width"),
        (Block(size=8, balanced=False), "use sparsity <= 0.9583 or a smaller structure.size"),
    ):
        message = told(lambda s=structure: s.geometry(48, 32, 0.01))
        assert message.startswith("sparsity: 0.99 leaves ") and message.endswith(wanted)


def test_no_update_at_all_drops_nothing() -> None:
    algorithm = from_yaml("dst/set", stop=0.0)
    assert not any(algorithm.is_due(step, 10) for step in range(11))
    assert algorithm.drop_fraction(5, 10) == 0.0
