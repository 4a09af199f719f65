"""C++ kernels: compiled ahead in a wheel, or for this very CPU at first use and then kept."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HEADERS = Path(__file__).parent
AHEAD = HEADERS / "ahead"
TEMPORARY = "building-"

# Not linked against an OpenMP of its own: it finds the one torch has loaded, and so obeys
# `torch.set_num_threads` in the thread that called it. A thread that Python starts has OpenMP's
# default (`OMP_NUM_THREADS`) until it calls it too, or runs an operation of torch on many elements.
COMPILE = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-c"]


class Level(NamedTuple):
    """CPUs that run the same code: what a compiler calls them, what Linux says of each."""

    name: str
    options: tuple[str, ...]
    flags: frozenset[str]


# Levels of the x86-64 psABI, as GCC 11 and later know them, and what /proc/cpuinfo lists there.
_V2 = frozenset(["cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])
# What libraries in a wheel are compiled for, best first; another CPU compiles for itself.
LEVELS = (
    Level("bf16", ("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}),
    Level("v4", ("-march=x86-64-v4",), _V4),
    Level("v3", ("-march=x86-64-v3",), _V3),
)


@functools.cache
def compiled(source: Path) -> ctypes.CDLL | None:
    """The shared library of one C++ `source` file, or None where it cannot be had.

    PADST_NATIVE=0 in the environment, read at the first use, does without.

    A wheel may bring libraries for levels of x86-64; the best that this CPU can run is taken.
    Else this needs GCC (`CXX`, by default g++) at the first use on a machine: some seconds. What it
    makes stays in a folder of this user's in `PADST_CACHE` (else `~/.cache/padst_exp`), by the hash
    of source, headers, compiler and CPU. A damaged library is compiled again. Where the folder
    cannot be made, or somebody else could write to it, they are compiled for this process alone.
    """
    try:
        if os.environ.get("PADST_NATIVE") == "0":
            raise OSError("PADST_NATIVE is 0")
        return _from_wheel(source) or _for_this_cpu(source)
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


def compile_ahead(folder: Path) -> list[Path]:
    """Compile every source for every level into `folder`, as a wheel carries them in `AHEAD`.

    Returns:
        The libraries; none on a machine whose CPUs have no such levels.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, or it does not know a level.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return []
    return [
        _build(source, level.options, folder / _ahead_name(source, level))
        for source in sources()
        for level in LEVELS
    ]


def _from_wheel(source: Path) -> ctypes.CDLL | None:
    has = _cpu_flags() if AHEAD.is_dir() else frozenset()
    for level in LEVELS:
        library = AHEAD / _ahead_name(source, level)
        if level.flags <= has and _is_whole(library):
            # One that wants a newer C library than this machine has is not loaded.
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(library))
    return None


def _ahead_name(source: Path, level: Level) -> str:
    # Without what differs between the machine that builds and the one that loads.
    return f"{source.parent.name}-{level.name}-{_key(source, *level.options)}.so"


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """What this CPU can do and the system allows, by Linux's names; none where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except (OSError, UnicodeError):
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _for_this_cpu(source: Path) -> ctypes.CDLL:
    # Every option that -march=native stands for on this CPU.
    target = _run([_compiler(), "-march=native", "-Q", "--help=target"])
    version = _run([_compiler(), "--version"])
    name = f"{source.parent.name}-{_key(source, target, version)}.so"
    folder = own_folder()
    if folder is not None and _is_whole(folder / name):
        return ctypes.CDLL(str(folder / name))
    for left in folder.glob(f"{TEMPORARY}*") if folder is not None else ():
        # By a process that was killed: none builds as long as that.
        if time.time() - left.lstat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY) as temporary:
        linked = _build(source, ["-march=native"], Path(temporary, name))
        if folder is None:
            return ctypes.CDLL(str(linked))
        # Several processes may build at once; each puts a whole file in place.
        linked.replace(folder / name)
    return ctypes.CDLL(str(folder / name))


def _key(source: Path, *rest: str) -> str:
    """Changes with the source, its headers, the options and `rest`."""
    headers = sorted([*HEADERS.glob("*.h"), *source.parent.glob("*.h")])
    code = b"".join(file.read_bytes() for file in [source, *headers])
    return hashlib.sha256(code + f"{COMPILE}{rest}".encode()).hexdigest()[:16]


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _build(source: Path, target: Iterable[str], library: Path) -> Path:
    """`library`, compiled for `target`, options of the compiler."""
    objects = library.with_suffix(".o")
    options = [*target, *COMPILE, f"-I{HEADERS}"]
    _run([_compiler(), *options, str(source), "-o", str(objects)])
    _run([_compiler(), "-shared", str(objects), "-o", str(library)])
    objects.unlink()
    content = library.read_bytes()
    # Behind what a loader reads.
    library.write_bytes(content + hashlib.sha256(content).digest())
    return library


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
    # What a compiler says may be in any encoding. On a busy machine its 10 seconds can be minutes.
    done = subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=900
    )
    return done.stdout
