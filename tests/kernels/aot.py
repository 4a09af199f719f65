"""Compile, without a GPU, exactly what the launchers would launch, and read the machine code.

A process of its own, because `TRITON_INTERPRET` must be unset before triton is imported:

    python aot.py 90 bfloat16 [the names to compile; all]

prints a JSON object per kernel: its name and counts from PTX, SASS and ptxas.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from padst_kernels.activations import empty_features
from padst_kernels.diagonals import kernels as diagonals
from padst_kernels.entries import kernels as entries
from padst_kernels.tiles import kernels as tiles
from padst_kernels.tiles.kernels import input_gradient, product, weight_gradient

_TOOLS = Path(os.path.dirname(triton.backends.nvidia.__file__)) / "bin"
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.uint16: "*u16",
}
_OPTIONS = ("num_warps", "num_stages")


class _Recorder:
    def __init__(self, kernel: JITFunction[Any], launches: list[tuple[Any, ...]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[tuple[Any, ...]]]:
    """Launches of the kernels in `modules` are written down instead of run."""
    launches: list[tuple[Any, ...]] = []
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    for module, name, kernel in kernels:
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def compile_launch(
    kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any], arch: int
) -> dict[str, int]:
    """Counts of what matters in the machine code of one recorded launch."""
    options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update({name: value for name, value in kwargs.items() if name not in _OPTIONS})
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        # The same specialisation as a launch: 1 and None are constants, 16 divides or not.
        is_tensor = isinstance(value, torch.Tensor)
        if name in constants or value is None or (not is_tensor and value == 1):
            signature[name], constexprs[(index,)] = "constexpr", value
            continue
        signature[name] = _TYPES[value.dtype] if is_tensor else "i32"
        if (value.data_ptr() if is_tensor else value) % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _read(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


def _read(ptx: str, cubin: bytes, shared: int) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None and "EXIT" in sass, usage + sass

    def count(pattern: str, text: str = ptx) -> int:
        return len(re.findall(pattern, text))

    return {
        "registers": int(found[1]),
        "spills": count(r"\b(STL|LDL)\b", sass) + int(found[2]),
        "shared": shared,
        "wgmma": count(r"wgmma\.mma"),
        "mma": count(r"mma\.sync"),
        "copies_16": count(r"cp\.async\.c[ag]\.shared\.global.*0x10"),
        "copies_8": count(r"cp\.async\.ca\.shared\.global.*0x8\b"),
        "copies_4": count(r"cp\.async\.ca\.shared\.global.*0x4\b"),
        "loads_16": count(r"ld\.global\S*\.v4\.(b|u)32|ld\.global\S*\.v2\.(b|u)64"),
        "loads_2": count(r"ld\.global\S*\.[bu]16\b"),
        "stores_16": count(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64"),
        "stores_2": count(r"st\.global\S*\.b16\b"),
    }


def _run(tool: str, *arguments: str) -> str:
    command = [_TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kind of launch for a 768 -> 3072 layer at 90%. `fm`, `tm`: layouts in and out."""
    precision = "tf32" if dtype == torch.float32 else "ieee"

    def index(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def features(num_features: int, num_tokens: int = 6304, major: str = "fm") -> torch.Tensor:
        return empty_features(num_features, num_tokens, empty, major == "fm")

    def forward(x: torch.Tensor, **options: Any) -> Callable[[], Any]:
        return partial(tiles.launch_product, x, **options, precision=precision)

    def dw(*arguments: Any, **options: Any) -> Callable[[], Any]:
        return partial(tiles.launch_weight_gradient, *arguments, **options, precision=precision)

    def dx(*arguments: Any, **options: Any) -> Callable[[], Any]:
        return partial(tiles.launch_input_gradient, *arguments, **options, precision=precision)

    empty = torch.empty(0, dtype=dtype)
    x, dy, bias, rows = features(768), features(3072), torch.zeros(3072), index(3072)
    mean = torch.zeros(6304)
    x_tm, dy_tm = features(768, 6304, "tm"), features(3072, 6304, "tm")
    few_x, few_dy, few_dy_tm = features(768, 197), features(3072, 197), features(3072, 197, "tm")
    for height in (16, 32, 64, 128):
        groups = 3072 // height
        weight, columns = torch.empty(groups, 77, height, dtype=dtype), index(groups, 77)
        slots = index(groups, height), index(769), index(groups * 77), 768
        nm = {"weight": weight, "columns": columns, "row_pointer": None, "out_features": 3072}
        yield f"forward nm{height} fm fm", forward(x=x, **nm, rows=rows)
        yield f"forward nm{height} fm tm", forward(x=x, **nm, bias=bias, feature_major=False)
        yield (
            f"forward nm{height} fm fm epilogue",
            forward(x=x, **nm, rows=rows, bias=bias, gelu=True, residual=dy),
        )
        yield (
            f"forward nm{height} fm fm norm",
            forward(x=x, **nm, rows=rows, bias=bias, gelu=True, norm=(mean, mean, bias)),
        )
        yield (
            f"forward nm{height} fm fm gelu gradient",
            forward(x=x, **nm, rows=rows, bias=bias, gelu_gradient=dy),
        )
        in_l1 = tiles.LaunchShape(tokens=64, columns=64, warps=4, stages=5, row_blocks=groups)
        yield f"forward nm{height} fm fm in L1", forward(x=x, **nm, rows=rows, launch=in_l1)
        yield f"forward nm{height} fm fm ragged", forward(x=few_x, **nm, rows=rows)
        yield f"forward nm{height} fm fm few", forward(x=features(768, 5), **nm, rows=rows)
        yield (
            f"forward nm{height} tm tm",
            forward(x=x_tm, **nm, feature_major=False),
        )
        yield (
            f"dx nm{height} fm fm",
            dx(dy, weight, *slots, workspace=1 << 40),
        )
        yield (
            f"dw nm{height} fm fm",
            dw(x, dy, columns, None, rows, height),
        )
        yield (
            f"dx nm{height} tm tm runs",
            dx(dy_tm, weight, *slots, run=height, feature_major=False),
        )
        yield (
            f"dw nm{height} tm tm",
            dw(x_tm, dy_tm, columns, None, None, height),
        )
        yield (
            f"forward nm{height} fm tm ragged epilogue",
            forward(x=few_x, **nm, bias=bias, gelu=True, residual=few_dy_tm, feature_major=False),
        )
        yield f"dx nm{height} fm fm ragged", dx(few_dy, weight, *slots, workspace=1 << 40)
        yield f"dx nm{height} tm fm runs", dx(dy_tm, weight, *slots, run=height)
        yield f"dw nm{height} fm fm ragged", dw(few_x, few_dy, columns, None, rows, height)
        yield f"dw nm{height} fm tm", dw(x, dy_tm, columns, None, None, height)
        num_tiles = 3072 * 768 // (10 * height * height)
        columns, pointer = index(num_tiles, height), index(groups + 1)
        weight = torch.empty(num_tiles, height, height, dtype=dtype)
        block = {"weight": weight, "columns": columns, "row_pointer": pointer, "out_features": 3072}
        yield f"forward block{height} fm fm", forward(x=x, **block, rows=rows)
        yield (
            f"forward block{height} tm tm runs",
            forward(x=x_tm, **block, run=height, feature_major=False),
        )
        yield f"forward block{height} tm fm runs", forward(x=x_tm, **block, run=height)
        block |= {"row_pointer": index(768 // height + 1), "out_features": 768}
        block |= {"order": index(num_tiles), "transposed": True}
        yield f"dx block{height} fm fm", forward(x=dy, **block, rows=index(768))
        yield (
            f"dx block{height} tm tm runs",
            forward(x=dy_tm, **block, run=height, feature_major=False),
        )
        yield (
            f"dw block{height} fm fm",
            dw(x, dy, columns, pointer, rows, height, order=index(num_tiles), run=height),
        )
        yield (
            f"dw block{height} tm tm runs",
            dw(x_tm, dy_tm, columns, pointer, None, height, order=index(num_tiles), run=height),
        )
    # Offsets in classes modulo 12: tiles of 64 inputs and 256 outputs.
    weight = torch.empty(12, 64, 256, dtype=dtype)
    stride = {"weight": weight, "row_pointer": index(13), "order": index(12)}
    yield (
        "forward stride12 fm fm",
        forward(x=x, **stride, columns=index(12, 64), out_features=3072, rows=rows),
    )
    epilogue = {"bias": bias, "gelu": True, "residual": few_dy}
    yield (
        "forward stride12 fm fm ragged epilogue",
        forward(x=few_x, **stride, columns=index(12, 64), out_features=3072, rows=rows, **epilogue),
    )
    yield "dw stride12 fm fm", dw(x, dy, index(12, 64), index(13), rows, 256, order=index(12))
    yield (
        "dx stride12 fm fm",
        forward(
            x=dy,
            **stride,
            columns=index(12, 256),
            out_features=768,
            rows=index(768),
            transposed=True,
        ),
    )
    values, offsets, columns = torch.empty(77, 768, dtype=dtype), index(77), index(768)
    sides = {"by_row": False, "columns": columns, "rows": rows}
    yield (
        "forward diagonals fm fm",
        partial(diagonals.launch_diagonals, x, values, offsets, 3072, **sides),
    )
    yield (
        "forward diagonals tm tm",
        partial(
            diagonals.launch_diagonals,
            x_tm,
            values,
            offsets,
            3072,
            by_row=False,
            feature_major=False,
        ),
    )
    yield (
        "dw diagonals fm fm",
        partial(diagonals.launch_diagonals_gradient, x, dy, offsets, **sides),
    )
    num_entries = 3072 * 768 // 10
    values, numbers = (
        torch.empty(num_entries, dtype=dtype),
        torch.empty(num_entries, dtype=torch.uint16),
    )
    for num_tokens in (1, 4, 8, 64):
        few_x = features(768, num_tokens, "fm" if num_tokens > 1 else "tm")
        yield (
            f"forward entries {num_tokens}",
            partial(
                entries.launch_condensed, few_x, values, numbers, index(3073), index(3072), 3072
            ),
        )


def main(arch: int, dtype: torch.dtype, names: list[str]) -> None:
    for launch_name, launch in launches(dtype):
        if names and launch_name not in names:
            continue
        with recorded(product, input_gradient, weight_gradient, diagonals, entries) as recordings:
            launch()
        for kernel, args, kwargs in recordings:
            counts = compile_launch(kernel, args, kwargs, arch)
            row = {"name": launch_name, "kernel": kernel.__name__, **counts}
            sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3:])
