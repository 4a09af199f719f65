"""C++ kernels, compiled for this very CPU at first use and kept in a cache directory."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path

HEADERS = Path(__file__).parent
TEMPORARY = "building-"

# Not linked against an OpenMP of its own: it finds the one torch has loaded, and so obeys
# `torch.set_num_threads` in the thread that called it. A thread that Python starts has OpenMP's
# default (`OMP_NUM_THREADS`) until it calls it too, or runs an operation of torch on many elements.
COMPILE = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", f"-I{HEADERS}", "-c"]


@functools.cache
def compiled(source: Path) -> ctypes.CDLL | None:
    """The shared library of one C++ `source` file, or None where it cannot be had.

    PADST_NATIVE=0 in the environment, read at the first use, does without.

    Needs GCC (`CXX`, by default g++) at the first use on a machine: some seconds. Libraries
    stay in a folder of this user's in `PADST_CACHE` (else `~/.cache/padst_exp`), by the hash of
    source, headers, compiler and CPU. A damaged one is compiled again. Where the folder cannot be
    made, or somebody else could write to it, they are compiled for this process alone.
    """
    try:
        if os.environ.get("PADST_NATIVE") == "0":
            raise OSError("PADST_NATIVE is 0")
        return _loaded(source)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), (lines or ["killed"])[-1])
        _warn(reason)
        return None


@functools.cache
def sources() -> tuple[Path, ...]:
    """All files that are compiled, each to a library."""
    return tuple(sorted(HEADERS.rglob("*.cpp")))


def has_native() -> bool:
    """Whether the library of every source can be had."""
    return None not in map(compiled, sources())


@functools.cache
def _warn(reason: str) -> None:
    # Measured on layers of 768x3072 at 90% sparsity, forward and backward.
    logging.getLogger(__name__).warning(
        "no compiled CPU kernels, so plain PyTorch computes sparse layers, 3 to 6 times slower: %s",
        reason,
    )


def _loaded(source: Path) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or "g++"
    # Every option that -march=native stands for on this CPU.
    target = _run([compiler, "-march=native", "-Q", "--help=target"])
    version = _run([compiler, "--version"])
    headers = sorted([*HEADERS.glob("*.h"), *source.parent.glob("*.h")])
    code = b"".join(file.read_bytes() for file in [source, *headers])
    key = hashlib.sha256(code + f"{COMPILE}{target}{version}".encode()).hexdigest()
    name = f"{source.parent.name}-{key[:16]}.so"
    folder = own_folder()
    if folder is not None and _is_whole(folder / name):
        return ctypes.CDLL(str(folder / name))
    for left in folder.glob(f"{TEMPORARY}*") if folder is not None else ():
        # By a process that was killed: none builds as long as that.
        if time.time() - left.lstat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY) as temporary:
        objects, linked = Path(temporary, "kernel.o"), Path(temporary, name)
        _run([compiler, *COMPILE, str(source), "-o", str(objects)])
        _run([compiler, "-shared", str(objects), "-o", str(linked)])
        content = linked.read_bytes()
        # Behind what a loader reads.
        linked.write_bytes(content + hashlib.sha256(content).digest())
        if folder is None:
            return ctypes.CDLL(str(linked))
        # Several processes may build at once; each puts a whole file in place.
        linked.replace(folder / name)
    return ctypes.CDLL(str(folder / name))


@functools.cache
def own_folder() -> Path | None:
    """Where this user's libraries are kept, or None where no folder is theirs alone."""
    try:
        cache = Path(os.environ.get("PADST_CACHE") or Path.home() / ".cache" / "padst_exp")
        folder = cache / f"native-{os.geteuid()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode):
            raise OSError(f"{folder} is a link")
        if state.st_uid != os.geteuid():
            raise OSError(f"{folder} is another user's")
        if state.st_mode & 0o077:
            raise OSError(f"{folder} is open to others (chmod 700 closes it)")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(f"{folder} cannot be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        logging.getLogger(__name__).warning(
            "CPU kernels are compiled for this process alone, some seconds each: %s", error
        )
        return None
    return folder


def _is_whole(library: Path) -> bool:
    """Whether a library is there and what its last bytes say of it is true.

    To load one that is not whole may end the process.
    """
    try:
        content = library.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _run(command: list[str]) -> str:
    # What a compiler says may be in any encoding.
    done = subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=120
    )
    return done.stdout
