"""The CUDA kernel of dX: what NVRTC makes of it, and where it is available. No GPU needed."""

import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton.backends.nvidia

from padst_kernels.tiles import cuda
from padst_kernels.tiles.cuda import input_gradient, nvrtc

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}


def machine_code(arch: int, height: int, dtype: torch.dtype) -> tuple[str, str]:
    """What ptxas used, and SASS."""
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    definitions = input_gradient.definitions(height, dtype)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(nvrtc.compile_source(input_gradient.SOURCE, arch, definitions))
        file.flush()
        commands = [tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm"]
        usage, sass = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    return usage, sass


needs_nvrtc = pytest.mark.skipif(nvrtc.compiler() is None, reason="no libnvrtc")


@needs_nvrtc
@pytest.mark.parametrize("height", input_gradient.HEIGHTS)
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        (90, torch.bfloat16),
        pytest.param(80, torch.float16, marks=pytest.mark.slow),
        pytest.param(90, torch.float16, marks=pytest.mark.slow),
        pytest.param(80, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_compiles_well(arch: int, height: int, dtype: torch.dtype) -> None:
    usage, sass = machine_code(arch, height, dtype)
    name = "BF16" if dtype == torch.bfloat16 else ""
    products = re.findall(r"HMMA\.(\S+)", sass)
    assert products == [f"16816.F32.{name}".rstrip(".")] * (height // 16 * 4)
    assert "STACK:0" in usage and not re.search(r"\b(STL|LDL)\b", sass)
    copies = re.findall(r"LDGSTS\.(\S+)", sass)
    assert copies and all(copy.endswith(".128") for copy in copies)
    assert set(re.findall(r"STG\.(\S+)", sass)) == {"E.128"}
    # Indices, and the weight: 4 x 8 bytes of a slot at V = 16.
    wide = "E.64.CONSTANT" if height == 16 else "E.128.CONSTANT"
    assert set(re.findall(r"LDG\.(\S+)", sass)) == {"E.CONSTANT", wide}
    assert "LDSM.16.MT88.4" in sass
    # Two warps for 16 slots: 768 inputs at 10% are 10 warps in one turn, and all may start.
    registers = re.search(r"REG:(\d+)", usage)
    assert registers and int(registers[1]) * 32 * input_gradient.MAX_WARPS[height] <= 65536


@needs_nvrtc
def test_compiler_errors_say_what_is_wrong() -> None:
    with pytest.raises(RuntimeError, match=r"input_gradient\.cu: .*STAGES"):
        nvrtc.compile_source(input_gradient.SOURCE, 90, {"HEIGHT": 16, "BFLOAT16": 1})


def test_tiles_fit_into_shared_memory() -> None:
    for height in input_gradient.HEIGHTS:
        for arch, shared_memory in SHARED_MEMORY.items():
            for in_features in (1, 768, 1600, 3072, 5120):
                slices = cuda.num_slices(in_features, height, shared_memory)
                needed = input_gradient.shared_bytes(height, None, -(-in_features // slices))
                assert needed <= shared_memory
                assert slices == 1 or needed > shared_memory * (slices - 1) / slices - (64 << 10)
            assert cuda.num_slices(768, height, shared_memory) == {80: 2, 90: 1}[arch]


def test_available(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, major, library, expected in (
        ("cuda", 9, "NVRTC", True),
        ("cuda", 8, "NVRTC", True),
        ("cuda", 7, "NVRTC", False),
        ("cuda", 9, None, False),
        ("cpu", 9, "NVRTC", False),
    ):
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        monkeypatch.setattr(nvrtc, "compiler", lambda found=library: found)
        monkeypatch.setattr(nvrtc, "driver", lambda: "driver")
        assert cuda.available(torch.device(kind)) is expected
