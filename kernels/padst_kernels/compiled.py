"""C++ kernels, compiled for this very CPU at first use and kept in a cache directory."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from pathlib import Path

HEADERS = Path(__file__).parent

# Not linked against an OpenMP of its own: it finds the one torch has loaded, and so obeys
# `torch.set_num_threads` in the thread that called it. A thread that Python starts has OpenMP's
# default (`OMP_NUM_THREADS`) until it calls it too, or runs an operation of torch on many elements.
COMPILE = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", f"-I{HEADERS}", "-c"]


@functools.cache
def compiled(source: Path) -> ctypes.CDLL | None:
    """The shared library of one C++ `source` file, or None where it cannot be had.

    PADST_NATIVE=0 in the environment, read at the first use, does without.

    Needs GCC (`CXX`, by default g++) at the first use on a machine: some seconds. Libraries
    stay in `PADST_CACHE` (else `~/.cache/padst_exp`), by the hash of source, headers, compiler and
    CPU.
    """
    try:
        if os.environ.get("PADST_NATIVE") == "0":
            raise RuntimeError("PADST_NATIVE is 0")
        return ctypes.CDLL(str(_build(source)))
    # RuntimeError: also where there is no home directory.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1])
        logging.getLogger(__name__).warning(
            "no compiled CPU kernels, plain PyTorch instead: %s", reason
        )
        return None


def _build(source: Path) -> Path:
    compiler = os.environ.get("CXX", "g++")
    # Every option that -march=native stands for on this CPU.
    target = _run([compiler, "-march=native", "-Q", "--help=target"])
    version = _run([compiler, "--version"])
    headers = sorted([*HEADERS.glob("*.h"), *source.parent.glob("*.h")])
    code = b"".join(file.read_bytes() for file in [source, *headers])
    key = hashlib.sha256(code + f"{COMPILE}{target}{version}".encode()).hexdigest()
    cache = Path(os.environ.get("PADST_CACHE") or Path.home() / ".cache" / "padst_exp")
    library = cache / f"{source.parent.name}-{key[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            objects, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
            _run([compiler, *COMPILE, str(source), "-o", str(objects)])
            _run([compiler, "-shared", str(objects), "-o", str(linked)])
            # Several processes may build at once; each puts a whole file in place.
            linked.replace(library)
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout
