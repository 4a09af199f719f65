"""Whatever is typed: a run that is right, or one line and nothing changed on disk."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from omegaconf import OmegaConf

from fuzz.command_lines import command_lines, meaningless
from fuzz.program import Reached, fault
from padst_exp import train
from padst_exp.engine import loop
from padst_exp.sweeps.sweep import Sweep

DRAWS = int(os.environ.get("FUZZ_DRAWS", "15"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
MEMORY = 16 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where runs are refused; memory is limited, so that what asks for too much is told so."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    yield tmp_path_factory.mktemp("runs")
    resource.setrlimit(resource.RLIMIT_AS, before)


def drawn(number: int) -> Callable[[Callable[[list[str]], None]], Callable[[], None]]:
    """So many command lines, the same for every equal FUZZ_SEED."""

    def decorate(check: Callable[[list[str]], None]) -> Callable[[], None]:
        bounded = settings(
            max_examples=number,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        return seed(SEED)(bounded(given(command_lines())(check)))

    return decorate


def reached(*_: object) -> None:
    raise Reached


@pytest.fixture(autouse=True)
def no_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a sweep are processes of their own, whose time nobody limits."""
    monkeypatch.setattr(Sweep, "launch", reached)


def test_a_command_is_run_or_refused_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "run", reached)

    @drawn(2 * DRAWS // 3)  # the rest are files
    def check(arguments: list[str]) -> None:
        assert fault(train.main, arguments, folder) is None
        for path in folder.rglob("config.yaml"):
            assert not meaningless(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
        for path in folder.iterdir():
            shutil.rmtree(path)

    check()


@pytest.mark.slow
def test_a_step_of_what_is_accepted_trains_or_is_refused_in_one_line(folder: Path) -> None:
    short = ["trainer.steps=1", "trainer.epochs=null", "trainer.compile=false"]

    @drawn(max(5, DRAWS // 10))
    def check(arguments: list[str]) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        assert fault(train.main, [*arguments, *short], folder) is None

    check()
