"""The CUDA kernel of dX: emulated on a CPU thread by thread, and run on a GPU."""

import ctypes
import functools
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernel_cases import DEVICE, activation, assert_agrees, make_tiles
from padst_kernels.tiles import cuda, kernels
from padst_kernels.tiles.cuda import input_gradient, nvrtc
from padst_kernels.tiles.kernels import launch_input_gradient

HERE = Path(__file__).parent
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


@dataclass
class Case:
    """The weight of a layer in groups, and the same weight dense."""

    weight: Tensor
    columns: Tensor
    rows: Tensor
    dense: Tensor


def make_case(
    dtype: torch.dtype,
    height: int,
    num_groups: int,
    width: int,
    sizes: tuple[int, int],
    first_columns: tuple[Tensor, ...] = (),
) -> Case:
    """Random columns and rows; every second group has three rows and one column of padding."""
    in_features, out_features = sizes
    columns = torch.stack([torch.randperm(in_features)[:width] for _ in range(num_groups)])
    for g, given in enumerate(first_columns):
        columns[g] = given
    rows = torch.stack([torch.randperm(out_features)[:height] for _ in range(num_groups)])
    weight = torch.randn(num_groups, width, height).to(dtype)
    rows[::2, 5:8] = out_features
    weight[::2, :, 5:8] = 7.0  # finite
    if width > 1:
        columns[::2, 1] = in_features
        weight[::2, 1] = torch.nan
    dense = torch.zeros(out_features + 1, in_features + 1, dtype=torch.float64)
    for g in range(num_groups):
        dense[rows[g, :, None], columns[g]] += weight[g].double().t()
    return Case(weight, columns, rows.int(), dense[:-1, :-1])


def input_gradient_of(
    case: Case, dy: Tensor, slices: int = 1, launch: cuda.LaunchShape | None = None
) -> Tensor:
    in_features = case.dense.shape[1]
    entries = cuda.slice_entries(case.columns, in_features, slices)
    return cuda.launch_input_gradient_tile(
        dy, case.weight, case.rows, entries, in_features, launch=launch
    )


def assert_rounded(dx: Tensor, case: Case, dy: Tensor) -> None:
    """Nearly as good as the exact result rounded once."""
    exact = case.dense.t() @ dy.double().cpu()
    best = (exact.to(dx.dtype).double() - exact).norm()
    assert (dx.double().cpu() - exact).norm() <= 1.05 * best
    assert dx.stride() == (-(-dy.shape[1] // 16) * 16, 1)


@functools.cache
def emulation(
    height: int, dtype: torch.dtype, stages: int, old: str = "", new: str = ""
) -> ctypes.CDLL:
    """The kernel's source, or one with a fault, compiled for this CPU with emulated functions."""
    definitions = input_gradient.definitions(height, dtype, stages)
    source = input_gradient.SOURCE.read_text()
    assert old in source
    source = source.replace(old, new) if old else source
    code = f'#include "cuda_emulation.h"\n{source}\nEMULATED({input_gradient.KERNEL})\n'
    options = ["-O0", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{HERE}"]
    options += [f"-D{macro}={value}" for macro, value in definitions.items()]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "emulation.so")
        done = subprocess.run(
            ["g++", *options, "-x", "c++", "-", "-o", library],
            input=code,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        loaded = ctypes.CDLL(str(library))
    loaded.emulation_fault.restype = ctypes.c_char_p
    loaded.emulation_conflicts.restype = ctypes.c_long
    return loaded


@dataclass
class Emulator:
    """How to emulate, and what was seen."""

    seed: int = 0
    fault: tuple[str, str] = ("", "")
    conflicts: int = 0


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """The launcher works on CPU tensors."""
    if DEVICE != "cpu":
        pytest.skip("the emulation is of tensors on a CPU")
    settings = Emulator()

    class Kernel(nvrtc.Kernel):
        def launch(self, blocks: int, threads: int, stream: int, arguments: list) -> None:
            library = self._library
            dy, weight, rows, entries, dx, *sizes = [argument.value for argument in arguments]
            groups, width, out_features, in_features, _, slices, *tokens, dy_row, dx_row = sizes
            library.emulation_reset(settings.seed)

            def allow(start: int, size: int) -> None:
                library.emulation_allow(ctypes.c_void_p(start), ctypes.c_long(size))

            allow(weight, groups * width * self.height * 2)
            allow(rows, groups * self.height * 4)
            allow(entries, slices * groups * width * 4)
            for o in range(out_features):
                allow(dy + 2 * o * dy_row, 2 * tokens[0])
            for i in range(in_features):
                allow(dx + 2 * i * dx_row, 2 * tokens[1])
            super().launch(blocks, threads, stream, arguments)
            assert not library.emulation_fault(), library.emulation_fault().decode()
            settings.conflicts = library.emulation_conflicts()

    def kernel(
        device: torch.device, height: int, dtype: torch.dtype, stages: int, slice_rows: int
    ) -> nvrtc.Kernel:
        monkeypatch.setattr(
            nvrtc, "driver", lambda: emulation(height, dtype, stages, *settings.fault)
        )
        needed = input_gradient.shared_bytes(height, stages, slice_rows)
        made = Kernel(b"", input_gradient.KERNEL, 0, needed)
        made.height = height
        return made

    monkeypatch.setattr(input_gradient, "_kernel", kernel)
    monkeypatch.setattr(input_gradient, "_stream", lambda device: 0)
    return settings


# Compiling an emulation takes longer than running it.
@pytest.mark.parametrize(
    ("height", "dtype"),
    [
        (16, BFLOAT16),
        (32, FLOAT16),
        (64, BFLOAT16),
        (128, FLOAT16),
        pytest.param(16, FLOAT16, marks=pytest.mark.slow),
        pytest.param(32, BFLOAT16, marks=pytest.mark.slow),
        pytest.param(64, FLOAT16, marks=pytest.mark.slow),
        pytest.param(128, BFLOAT16, marks=pytest.mark.slow),
    ],
)
def test_equals_the_dense_product(emulator: Emulator, height: int, dtype: torch.dtype) -> None:
    case = make_case(dtype, height, num_groups=3, width=40, sizes=(61, 150))
    dy = activation(150, 70, dtype=dtype)
    assert_rounded(input_gradient_of(case, dy), case, dy)
    # No bank conflicts, whatever the columns: of multiples of 8 the rows of a matrix instruction
    # all start in the same bank.
    for columns in (torch.arange(0, 256, 8), torch.randperm(256)[:32]):
        case = make_case(dtype, height, 1, 32, (256, 130), (columns,))
        input_gradient_of(case, activation(130, 64, dtype=dtype))
        assert emulator.conflicts == 0


def test_rectangles_and_tokens(emulator: Emulator) -> None:
    for sizes in ((200, 17), (9, 90)):
        for num_tokens in (1, 16, 64, 129):
            case = make_case(BFLOAT16, 16, num_groups=3, width=min(sizes[0], 37), sizes=sizes)
            dy = activation(sizes[1], num_tokens, dtype=BFLOAT16)
            assert_rounded(input_gradient_of(case, dy), case, dy)


@pytest.mark.parametrize(("warps", "stages"), [(4, 8), (10, 2)])
def test_slices_of_any_columns(emulator: Emulator, warps: int, stages: int) -> None:
    # 140 slots of a group take several turns of a block, or none where all lie in other slices.
    ends = torch.arange(140), torch.arange(560, 700).flip(0)
    case = make_case(torch.bfloat16, 16, 6, 140, (700, 40), first_columns=ends)
    dy = activation(40, 33, dtype=case.weight.dtype)
    for slices in (1, 2, 5):
        assert_rounded(
            input_gradient_of(case, dy, slices, cuda.LaunchShape(warps, stages)), case, dy
        )


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("block_barrier();\n            group", "group", "race"),
        ("await_copies<STAGES - 2>", "await_copies<STAGES - 1>", "a copy is not awaited"),
        ("close_copies();", "", "a copy is not awaited"),
        ("if (token >= dx_tokens) continue;", "", "a store outside"),
        ("token < dy_tokens", "true", "a copy from outside"),
        (
            "block_barrier();\n    const",
            "if (warp) block_barrier();\n    const",
            "threads wait for ever",
        ),
    ],
)
def test_the_emulation_finds_faults(emulator: Emulator, old: str, new: str, found: str) -> None:
    case = make_case(torch.float16, 16, 12, 64, (64, 40))
    emulator.fault = old, new
    with pytest.raises(AssertionError, match=found):
        input_gradient_of(case, activation(40, 20, dtype=case.weight.dtype))


def test_the_emulation_counts_bank_conflicts(emulator: Emulator) -> None:
    for unswizzled in ("(n ^ turn)", "(chunk ^ (place & 7))"):
        case = make_case(FLOAT16, 16, 1, 32, (256, 40))
        case.columns[:] = torch.arange(32)
        emulator.fault = unswizzled, unswizzled.split()[0][1:]
        input_gradient_of(case, activation(40, 64, dtype=FLOAT16), launch=cuda.LaunchShape(4, 8))
        assert emulator.conflicts > 0


def test_the_backend_computes_dx_with_it(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole operator: permuted columns and rows, token-major activations."""
    columns = torch.stack([torch.randperm(45)[:9] for _ in range(4)])
    case = make_tiles(
        columns, None, (61, 45), height=16, num_row_groups=4, permuted=True, num_slices=2
    )
    # Not by the kernel that it replaces.
    monkeypatch.setattr(kernels, "launch_input_gradient", None)
    for num_tokens in (5, 70):
        x, weight = case.x(num_tokens, dtype=FLOAT16), case.weight.half()
        for gradient in assert_agrees(case.product("cuda"), case.reference, x, weight):
            assert gradient.is_contiguous()


@torch.no_grad()
def test_operators_pass_opcheck(emulator: Emulator) -> None:
    columns = torch.stack([torch.randperm(45)[:9] for _ in range(4)])
    case = make_tiles(
        columns, None, (61, 45), height=16, num_row_groups=4, permuted=True, num_slices=2
    )
    dy, weight = torch.randn(70, 61).half(), case.weight.half()
    for feature_major in (False, True):
        torch.library.opcheck(
            torch.ops.padst.tile_matmul_input_gradient.default,
            (dy, weight, *case.index, feature_major, "cuda"),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_any_order_of_warps_gives_the_same_bits(emulator: Emulator) -> None:
    case = make_case(BFLOAT16, 32, 9, 70, (90, 60))
    dy = activation(60, 40, dtype=case.weight.dtype)
    results = []
    for emulator.seed in range(4):
        results.append(input_gradient_of(case, dy, 2))
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_nothing_to_do(emulator: Emulator) -> None:
    case = make_case(torch.bfloat16, 16, 2, 8, (20, 32))
    assert input_gradient_of(case, activation(32, 0, dtype=case.weight.dtype)).shape == (20, 0)
    case = Case(case.weight[:0], case.columns[:0], case.rows[:0], torch.zeros(32, 20))
    assert (input_gradient_of(case, activation(32, 3, dtype=case.weight.dtype)) == 0).all()


def test_an_unaligned_weight_is_copied(emulator: Emulator) -> None:
    case = make_case(torch.bfloat16, 16, 2, 8, (20, 32))
    shifted = torch.empty(case.weight.numel() + 1, dtype=torch.bfloat16)[1:]
    case.weight = shifted.copy_(case.weight.flatten()).view(case.weight.shape)
    assert case.weight.data_ptr() % 16
    dy = activation(32, 3, dtype=case.weight.dtype)
    assert_rounded(input_gradient_of(case, dy), case, dy)


def test_refusals(emulator: Emulator) -> None:
    case = make_case(torch.bfloat16, 16, 2, 8, (20, 32))
    with pytest.raises(ValueError, match="expected feature-major"):
        input_gradient_of(case, torch.randn(16, 32).bfloat16().t())
    with pytest.raises(ValueError, match="dy: feature-major rows must start on multiples of 16"):
        input_gradient_of(case, torch.randn(32, 197).bfloat16())
    case.weight = case.weight.float()
    with pytest.raises(ValueError, match=r"torch.float32, expected one of .* and bfloat16"):
        input_gradient_of(case, torch.randn(32, 16))
    case = make_case(torch.bfloat16, 8, 2, 8, (20, 32))
    with pytest.raises(ValueError, match=r"8 rows in a group .* expected one of \(16, 32, 64, 128"):
        input_gradient_of(case, torch.randn(32, 16).bfloat16())


def test_slices_too_wide_for_the_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(major=8, minor=0, shared_memory_per_block_optin=163 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    case = make_case(torch.bfloat16, 64, 1, 8, (768, 64))
    with pytest.raises(ValueError, match="768 inputs in a slice need 221184 bytes of shared mem"):
        input_gradient_of(case, activation(64, 3, dtype=case.weight.dtype))


def test_slices_partition_the_slots() -> None:
    columns = torch.stack([torch.randperm(31)[:12] for _ in range(5)])
    columns[1, 3] = 30  # padding
    entries = cuda.slice_entries(columns, 30, 4)
    assert entries.shape == (4, 5, 12) and entries.dtype == torch.int32
    found = torch.full_like(columns, 30)
    for s in range(4):
        for g in range(5):
            listed = entries[s, g][entries[s, g] >= 0]
            assert (entries[s, g, len(listed) :] == -1).all()
            found[g, listed & 0xFFFF] = s * 8 + (listed.long() >> 16)
            assert (listed >> 16 < 8).all()
    assert torch.equal(found, columns)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("height", input_gradient.HEIGHTS)
def test_on_a_device(height: int, dtype: torch.dtype) -> None:
    for sizes in ((768, 3072), (3072, 768), (90, 200)):
        compare_on_a_device(height, dtype, sizes)


def compare_on_a_device(height: int, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if not cuda.available(device):
        pytest.skip("below sm_80, or no NVRTC")
    in_features, out_features = sizes
    num_groups, width = -(-out_features // height), in_features // 10
    case = make_case(dtype, height, num_groups, width, sizes)
    case.weight, case.columns = case.weight.to(device), case.columns.to(device)
    case.rows = case.rows.to(device)
    dy = activation(out_features, 4 * 197, dtype=dtype)
    shared_memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    fewest = cuda.num_slices(in_features, height, shared_memory)
    for slices in (fewest, fewest + 2):
        dx = input_gradient_of(case, dy, slices)
        assert_rounded(dx, case, dy)
        assert torch.equal(dx, input_gradient_of(case, dy, slices))
    by_feature = case.columns.flatten().sort(stable=True)
    features = torch.arange(in_features + 1, device=device)
    twin = launch_input_gradient(
        dy,
        case.weight,
        case.rows,
        torch.searchsorted(by_feature.values, features).int(),
        by_feature.indices.int(),
        in_features,
    )
    # The twin rounds the product of every slot.
    error = (dx.double() - twin.double()).norm() / twin.double().norm()
    assert error < 2 * torch.finfo(dtype).eps
