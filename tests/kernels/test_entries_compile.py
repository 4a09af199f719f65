"""What ptxas makes of the kernel of condensed weights, ahead of time: no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def compiled(python: str, arch: int, dtype: str) -> list[dict[str, int]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    kernels = str(Path(__file__).parents[2] / "kernels")
    script = Path(__file__).with_name("aot_entries.py")
    done = subprocess.run(
        [python, "-W", "ignore", script, str(arch), dtype],
        env=environment | {"PYTHONPATH": kernels},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(launches: list[dict[str, int]]) -> None:
    assert [launch["tokens"] for launch in launches] == [1, 4, 8, 64]
    for launch in launches:
        assert launch["spills"] == 0, launch
        # Values and columns; of more tokens, rows of x.
        assert launch["loads_16"] >= 2, launch


@pytest.mark.parametrize(("arch", "dtype"), [(90, "bfloat16"), (80, "float32")])
def test_reads_wide_and_spills_nothing(arch: int, dtype: str) -> None:
    check(compiled(sys.executable, arch, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_also_under_triton_3_6(arch: int, dtype: str) -> None:
    python = os.environ.get("PADST_PYTHON_TRITON36")
    if not python:
        pytest.skip("PADST_PYTHON_TRITON36 names no Python that has Triton 3.6")
    check(compiled(python, arch, dtype))
