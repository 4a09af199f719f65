"""What ptxas makes of every kernel, compiled ahead of time: no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import padst_kernels

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
# One of each kind of launch, of each height and of each epilogue.
REPRESENTATIVE = [
    "forward nm16 fm fm",
    "forward nm32 fm tm",
    "forward nm64 fm fm epilogue",
    "forward nm128 fm fm ragged",
    "forward nm64 fm fm norm",
    "forward nm32 fm fm gelu gradient",
    "forward nm64 tm tm",
    "forward block64 tm tm runs",
    "dx block16 fm fm",
    "dx block128 tm tm runs",
    "dx nm64 fm fm",
    "dw nm16 fm fm",
    "dw block32 fm fm",
    "forward diagonals fm fm",
    *(f"forward entries {tokens}" for tokens in (1, 64)),
]


def compiled(arch: int, dtype: str, names: list[str], python: str = sys.executable) -> list[dict]:
    script = Path(__file__).with_name("aot.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(padst_kernels.__file__).parents[1])
    done = subprocess.run(
        [python, "-W", "ignore", script, str(arch), dtype, *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} >= set(names)
    return kernels


def problems(kernel: dict, arch: int, dtype: str, most_copies_4: int = 10) -> list[str]:
    """What is wrong with the machine code of one kernel.

    Copies of 4 bytes are of indices: at most two lists, each as often as there are stages.
    """
    name, function = kernel["name"], kernel["kernel"]
    matrix = function in ("_product_kernel", "_weight_gradient_kernel")
    # A tile of 16 tokens is too low for wgmma, and its threads are too many for wide stores.
    few = name.endswith("few")
    # Nothing is contiguous in a gather of single columns from token-major activations.
    scattered = name.endswith("tm tm")
    found = []
    if kernel["shared"] > SHARED_MEMORY[arch]:
        found.append("too much shared memory")
    if "entries" in name:
        # Values and columns; of more tokens, rows of x.
        return [*found, f"{kernel}"] if kernel["spills"] or kernel["loads_16"] < 2 else found
    if dtype == "float32":
        return found
    if kernel["spills"]:
        found.append("spills")
    if matrix and arch == 90 and not few and (not kernel["wgmma"] or kernel["mma"]):
        found.append("not on wgmma")
    if matrix and (arch == 80 or few) and not kernel["mma"]:
        found.append("not on matrix instructions")
    if not scattered and not kernel["copies_16"] + kernel["loads_16"]:
        found.append("no 16-byte reads")
    if not scattered and kernel["copies_8"]:
        found.append("8-byte copies")
    if kernel["copies_4"] > most_copies_4:
        found.append("4-byte copies")
    # Diagonals read their values, not activations, one by one.
    if kernel["loads_2"] and not scattered and "diagonals" not in name:
        found.append("2-byte loads")
    if (not kernel["stores_16"] or kernel["stores_2"]) and not few and name != "dw diagonals fm fm":
        found.append("stores below 16 bytes")
    return [f"{name}, {function}, sm_{arch}, {dtype}: {problem} {kernel}" for problem in found]


def check(arch: int, dtype: str, names: list[str]) -> None:
    kernels = compiled(arch, dtype, names)
    assert not [line for kernel in kernels for line in problems(kernel, arch, dtype)]
    # The counts do see 2-byte loads, where a gather cannot do without.
    for kernel in kernels:
        if kernel["name"] == "forward nm64 tm tm" and dtype != "float32":
            feature_major = kernel | {"name": "forward nm64 fm fm"}
            assert any("2-byte" in line for line in problems(feature_major, arch, dtype))


def test_representative_kernels_compile_well() -> None:
    check(90, "bfloat16", REPRESENTATIVE)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("arch", "dtype"),
    # In float32 only shared memory is asserted, and compiling takes longest.
    [(80, "bfloat16"), (90, "float16"), (80, "float16"), (90, "float32"), (80, "float32")],
)
def test_representative_kernels_compile_well_everywhere(arch: int, dtype: str) -> None:
    check(arch, dtype, REPRESENTATIVE)


@pytest.mark.slow
@pytest.mark.skipif("PADST_COMPILE_ALL" not in os.environ, reason="make test-compile asks for it")
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles_well(arch: int) -> None:
    check(arch, "bfloat16", [])


# In Triton 3.6 each thread copies the indices of all the rows it reads: 8 times as many copies.
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_kernel_compiles_well_under_triton_3_6(arch: int, dtype: str) -> None:
    python = os.environ.get("PADST_PYTHON_TRITON36")
    if python is None:
        pytest.skip("PADST_PYTHON_TRITON36 names no Python that has Triton 3.6")
    query = [python, "-c", "import triton; print(triton.__version__)"]
    version = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    assert version.startswith("3.6.")
    kernels = compiled(arch, dtype, [], python)
    assert not [line for kernel in kernels for line in problems(kernel, arch, dtype, 80)]
