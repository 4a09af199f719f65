"""What a launcher says of the processes of a run, checked before anybody waits for the others."""

import os
import socket
from collections.abc import Mapping

import pytest

from padst_exp.engine import distributed, rendezvous
from padst_exp.errors import UserError

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def refusal(monkeypatch: pytest.MonkeyPatch, given: Mapping[str, str]) -> str:
    for name in (*NAMES, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        distributed.start("cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_variables_that_make_no_sense_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {"WORLD_SIZE": "2", "RANK": "1"}
    there = {**pair, "MASTER_ADDR": "localhost"}
    cases: list[tuple[Mapping[str, str], str]] = [
        *(({"WORLD_SIZE": value}, "WORLD_SIZE: ") for value in ("abc", "0", "-1", "", "1.0", "²")),
        *(({"RANK": value}, "RANK: ") for value in ("1", "-1", "x")),
        ({"WORLD_SIZE": "2"}, "RANK: expected a whole number from 0 to 1 in the environment, got "),
        ({**pair, "RANK": "2"}, "RANK: "),
        ({**pair, "LOCAL_RANK": "2"}, "LOCAL_RANK: "),
        (pair, "MASTER_ADDR: expected the host of process 0 in the environment, got nothing"),
        *(({**there, "MASTER_PORT": value}, "MASTER_PORT: ") for value in ("0", "65536", "x")),
        (there, "MASTER_PORT: "),
    ]
    for given, message in cases:
        assert refusal(monkeypatch, given).startswith(message), given


def test_a_port_in_use_and_a_silent_host_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "SECONDS_TO_REACH", 0)
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = str(taken.getsockname()[1])
        pair = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # Bound, but listening to nobody.
        said = refusal(monkeypatch, {**pair, "RANK": "1"})
        assert said.startswith("MASTER_ADDR: expected the host of process 0")
        taken.listen()
        assert refusal(monkeypatch, {**pair, "RANK": "0"}).startswith("MASTER_PORT: expected a fr")


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    world = distributed.start("cpu")
    assert (world.rank, world.size, os.environ.get("MASTER_ADDR")) == (0, 1, None)
