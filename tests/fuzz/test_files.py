"""Whatever has become of the files of a run: each program takes them, or refuses them in a line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fuzz.program import fault
from fuzz.test_command_lines import DRAWS, SEED
from hostile import DAMAGED, trained_run
from padst_exp import evaluate, export

# A reader that has no end to come to is for those that know how large a file may be.
WAYS = sorted(DAMAGED.keys() - {"no end"})


def test_damaged_runs_are_taken_or_refused_in_one_line(tmp_path: Path) -> None:
    sound = trained_run(tmp_path / "sound")
    files = sorted(str(path.relative_to(sound)) for path in sound.rglob("*") if path.is_file())
    programs: dict[str, Callable[[], None]] = {"evaluate": evaluate.main, "export": export.main}

    @seed(SEED)
    @settings(
        max_examples=max(4, DRAWS // 40),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        program=st.sampled_from(sorted(programs)),
        damages=st.lists(
            st.tuples(st.sampled_from(files), st.sampled_from(WAYS)), min_size=1, max_size=2
        ),
    )
    def check(program: str, damages: list[tuple[str, str]]) -> None:
        folder = tmp_path / "drawn"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder / "run")
        for name, way in dict(damages).items():
            DAMAGED[way](folder / "run" / name)
        arguments = ["run=run", "device=cpu"]
        assert fault(programs[program], arguments, folder) is None, (program, damages)

    check()


@pytest.mark.slow
def test_programs_take_sound_runs(tmp_path: Path) -> None:
    sound = trained_run(tmp_path)
    for main in (evaluate.main, export.main):
        assert fault(main, [f"run={sound}", "device=cpu"], tmp_path) is None
