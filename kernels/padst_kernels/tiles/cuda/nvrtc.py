"""CUDA C++ compiled in this process and launched: NVRTC and the driver, both through ctypes.

`torch.cuda._compile_kernel` does the same, but is private and wants a CUDA toolkit for its
headers. A cubin rather than PTX: NVRTC may be newer than the driver, within one major version.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_MAX_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@functools.cache
def compiler() -> ctypes.CDLL | None:
    """NVRTC of the CUDA version torch was built with, or None where there is none."""
    if torch.version.cuda is None:
        return None
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    wheels = importlib.util.find_spec("nvidia")
    folders = wheels.submodule_search_locations or [] if wheels else []
    found = [str(path) for folder in folders for path in Path(folder).glob(f"*/lib/{name}")]
    return _first_library([*found, name])


@functools.cache
def driver() -> ctypes.CDLL | None:
    """The CUDA driver, or None where there is none."""
    return _first_library(["libcuda.so.1"])


def _first_library(names: list[str]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def compile_source(source: Path, architecture: int, definitions: dict[str, int]) -> bytes:
    """The cubin of one CUDA C++ file.

    Args:
        source: a file without includes.
        architecture: 90 for sm_90.
        definitions: macros.

    Raises:
        RuntimeError: there is no NVRTC, or it refuses; with its log.
    """
    library = compiler()
    if library is None:
        raise RuntimeError(f"{source.name}: NVRTC not found, expected it with CUDA builds of torch")
    program = ctypes.c_void_p()
    code, name = source.read_bytes(), source.name.encode()
    _check_nvrtc(library.nvrtcCreateProgram(ctypes.byref(program), code, name, 0, None, None))
    options = [f"--gpu-architecture=sm_{architecture}", "-std=c++17"]
    options += [f"-D{macro}={value}" for macro, value in definitions.items()]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        if library.nvrtcCompileProgram(program, len(options), array):
            log = _read(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
            raise RuntimeError(f"{source.name}: {ctypes.string_at(log).decode()}")
        return _read(program, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """A kernel of a cubin, loaded into the primary context of a device, which is torch's.

    Args:
        image: the cubin.
        name: of the kernel.
        device: index of the device.
        shared_bytes: dynamic shared memory of every launch.

    Raises:
        RuntimeError: the driver refuses.
    """

    def __init__(self, image: bytes, name: str, device: int, shared_bytes: int) -> None:
        library = driver()
        assert library is not None
        self._library, self._shared_bytes = library, shared_bytes
        handle, module = ctypes.c_int(), ctypes.c_void_p()
        self._context, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(library.cuDeviceGet(ctypes.byref(handle), device))
        self._check(library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), handle))
        with self._entered():
            self._check(library.cuModuleLoadData(ctypes.byref(module), image))
            function = ctypes.byref(self._function)
            self._check(library.cuModuleGetFunction(function, module, name.encode()))
            attribute = _MAX_DYNAMIC_SHARED_MEMORY
            self._check(library.cuFuncSetAttribute(self._function, attribute, shared_bytes))

    def launch(
        self, blocks: int, threads: int, stream: int, arguments: Sequence[ctypes._SimpleCData[Any]]
    ) -> None:
        """Start `blocks` x `threads` on the CUDA stream with this handle."""
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        shape = (blocks, 1, 1, threads, 1, 1)
        handle = ctypes.c_void_p(stream)
        with self._entered():
            self._check(
                self._library.cuLaunchKernel(
                    self._function, *shape, self._shared_bytes, handle, pointers, None
                )
            )

    @contextmanager
    def _entered(self) -> Iterator[None]:
        # The current one may be of another device, or none in a thread that autograd started.
        self._check(self._library.cuCtxPushCurrent_v2(self._context))
        try:
            yield
        finally:
            self._check(self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))

    def _check(self, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(result, ctypes.byref(text))
            raise RuntimeError(f"CUDA driver: {(text.value or b'').decode()} ({result})")


def _check_nvrtc(result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC: error {result}")


def _read(
    program: ctypes.c_void_p, get_size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer
) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(get_size(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check_nvrtc(get(program, buffer))
    return buffer.raw
