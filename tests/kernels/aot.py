"""Compile, without a GPU, exactly what a launcher would launch, and read the machine code.

`TRITON_INTERPRET` must be unset before triton is imported: use a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TOOLS = Path(os.path.dirname(triton.backends.nvidia.__file__)) / "bin"
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
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
    assert found is not None, usage

    def count(pattern: str, text: str = ptx) -> int:
        return len(re.findall(pattern, text))

    return {
        "registers": int(found[1]),
        "spills": count(r"\b(STL|LDL)\b", sass),
        "shared": shared,
        "wgmma": count(r"wgmma\.mma"),
        "mma": count(r"mma\.sync"),
        "copies_16": count(r"cp\.async\.c[ag]\.shared\.global.*0x10"),
        "copies_small": count(r"cp\.async\.ca\.shared\.global.*0x[48]\b"),
        "loads_16": count(r"ld\.global\S*\.v4\.(b|u)32|ld\.global\S*\.v2\.(b|u)64"),
        "loads_2": count(r"ld\.global\S*\.[bu]16\b"),
        "stores_16": count(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64"),
        "stores_2": count(r"st\.global\S*\.b16\b"),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True).stdout
