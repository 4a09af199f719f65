"""Whatever is typed: a run that is right, or one line and nothing changed on disk."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from omegaconf import DictConfig, OmegaConf

from fuzz.command_lines import command_lines, meaningless
from fuzz.program import Reached, fault
from padst_exp import train
from padst_exp.engine import loop

DRAWS = int(os.environ.get("FUZZ_DRAWS", "50"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
MEMORY = 16 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where runs are refused; memory is limited, so that what asks for too much is told so."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    yield tmp_path_factory.mktemp("runs")
    resource.setrlimit(resource.RLIMIT_AS, before)


def stopping_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise Reached

    monkeypatch.setattr(loop, "run", run)


def test_a_command_is_run_or_refused_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping_before_training(monkeypatch)
    accepted: list[DictConfig] = []
    build = train.build_experiment
    monkeypatch.setattr(
        train, "build_experiment", lambda cfg, world: (accepted.append(cfg), build(cfg, world))[1]
    )

    @seed(SEED)
    @settings(
        max_examples=DRAWS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines())
    def check(arguments: list[str]) -> None:
        accepted.clear()
        assert fault(train.main, arguments, folder) is None
        if (folder / "runs").exists():
            shutil.rmtree(folder / "runs")
            config = OmegaConf.to_container(accepted[0], resolve=True)
            assert not meaningless(config)

    check()
