"""How C++ is compiled and kept, and what runs where it cannot be."""

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernel_cases import DEVICE, needs, random_entries, random_tiles
from padst_kernels import compiled as compiled_module
from padst_kernels import entries, tiles
from padst_kernels.compiled import LEVELS, compile_ahead, compiled, own_folder

ONE = "int one() { return 1; }\n"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where a library may be written, with an empty cache, if there is a compiler."""
    needs("native")
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))
    own_folder.cache_clear()
    yield tmp_path / "kernel.cpp"
    own_folder.cache_clear()


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that starts with PADST_NATIVE=0."""
    caches = compiled, tiles.native.library, entries.native.functions
    monkeypatch.setenv("PADST_NATIVE", "0")
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.skipif(DEVICE != "cpu", reason="native kernels want a CPU")
@pytest.mark.usefixtures("without_native")
def test_plain_pytorch_stands_in_for_native_kernels(caplog: pytest.LogCaptureFixture) -> None:
    tiled, single = random_tiles(33, 6, 5, 8, 3, 21, True), random_entries((67, 41), 300, 5)
    for case, weight in ((tiled, tiled.weight), (single, single.values)):
        x, weight = case.x(9).requires_grad_(), weight.requires_grad_()
        results = []
        for backend in ("native", "torch"):
            y = case.product(backend)(x, weight)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
        for stand_in, plain in zip(*results, strict=True):
            assert torch.equal(stand_in, plain)
    assert "3 to 6 times slower: PADST_NATIVE is 0" in caplog.text


def test_no_compiler_no_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text(ONE)
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert compiled(source) is None
    assert "so plain PyTorch computes" in caplog.text


def test_says_why_the_compiler_refuses(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text('#include "wrong.h"\n')
    source.with_name("wrong.h").write_text("int one() { return two; }\n")
    assert compiled(source) is None
    assert "error: " in caplog.text and "In file included" not in caplog.text


def built(source: Path) -> ctypes.CDLL:
    """As in another process."""
    own_folder.cache_clear()
    library = compiled.__wrapped__(source)
    assert library is not None
    return library


def kept(source: Path) -> Path:
    (library,) = (source.parent / "cache" / f"native-{os.geteuid()}").iterdir()
    return library


def test_a_library_is_built_once_for_each_version_of_its_files(source: Path) -> None:
    header, folder = source.with_name("one.h"), source.parent / "cache" / f"native-{os.geteuid()}"
    source.write_text('#include "one.h"\nextern "C" int one() { return ONE; }\n')
    header.write_text("#define ONE 1\n")

    def files() -> dict[Path, int]:
        built(source)
        return {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    first = files()
    assert len(first) == 1 and files() == first
    header.write_text("#define ONE 2\n")
    # What a killed process was building goes with the next build; what is being built stays.
    for name, age in (("building-old", 9999), ("building-new", 9)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    second = files()
    assert second.pop(folder / "building-new") and folder / "building-old" not in second
    assert len(second) == 2 and second.items() > first.items()


def test_a_damaged_library_is_never_loaded_but_built_again(source: Path) -> None:
    """Loading one may end the process, by SIGBUS or SIGSEGV."""
    source.write_text(f'extern "C" {ONE}')
    assert built(source).one() == 1
    sound = kept(source).read_bytes()
    source.write_text(f'extern "C" {ONE.replace("1", "2")}')
    built(source)
    planted = next(p.read_bytes() for p in kept_all(source) if p.read_bytes() != sound)
    source.write_text(f'extern "C" {ONE}')
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    name = next(path for path in kept_all(source) if path.read_bytes() == sound)
    for content in (
        b"", sound[:-1], sound[: len(sound) // 2], sound[:-32], bytes(flipped), sound + b"x",
        planted[:-32], bytes(len(sound)),
    ):  # fmt: skip
        name.unlink()  # this process has it in its memory
        name.write_bytes(content)
        assert built(source).one() == 1
        assert name.read_bytes() == sound
    name.unlink()
    name.mkdir()
    # What cannot be replaced costs the kernels, not the process.
    own_folder.cache_clear()
    assert compiled.__wrapped__(source) is None


def kept_all(source: Path) -> list[Path]:
    return list((source.parent / "cache" / f"native-{os.geteuid()}").iterdir())


def test_only_a_folder_that_is_ours_alone_is_used(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source.write_text(f'extern "C" {ONE}')
    cache = source.parent / "cache"
    folder, other = (cache / f"native-{os.geteuid() + number}" for number in range(2))
    built(source)
    assert folder.stat().st_mode & 0o777 == 0o700
    library = kept(source)
    whole = library.read_bytes()

    def open_to_others() -> None:
        folder.chmod(0o777)

    def another_users() -> None:
        folder.chmod(0o700)
        folder.rename(other)
        monkeypatch.setattr(os, "geteuid", lambda: int(other.name.removeprefix("native-")))

    def a_link() -> None:
        monkeypatch.undo()
        monkeypatch.setenv("PADST_CACHE", str(cache))
        other.rename(cache / "elsewhere")
        folder.symlink_to("elsewhere")

    def a_file() -> None:
        folder.unlink()
        folder.write_text("")

    def no_home() -> None:
        monkeypatch.delenv("PADST_CACHE")
        monkeypatch.delenv("HOME", raising=False)
        # As of a user whom the system does not know.
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)

    for change, said in (
        (open_to_others, "is open to others"),
        (another_users, "is another user's"),
        (a_link, "is a link"),
        (a_file, "File exists"),
        (no_home, "Could not determine home directory"),
    ):
        change()
        caplog.clear()
        own_folder.cache_clear()
        for _ in range(2):
            found = compiled.__wrapped__(source)
            assert found is not None and found.one() == 1
            assert not found._name.startswith(str(cache)), said
        # Said once, and nothing is left behind.
        assert caplog.text.count("for this process alone") == 1 and said in caplog.text
        assert not os.path.exists(os.path.dirname(found._name))
    assert (cache / "elsewhere" / library.name).read_bytes() == whole


def test_of_what_a_wheel_brings_the_best_that_this_cpu_runs_is_loaded(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, best = source.parent / "ahead", LEVELS[0].flags
    ahead.mkdir()
    source.write_text(f'extern "C" {ONE}')
    monkeypatch.setattr(compiled_module, "AHEAD", ahead)
    monkeypatch.setattr(compiled_module, "sources", lambda: (source,))
    if not compile_ahead(ahead):
        pytest.skip("no levels of this kind of CPU")

    def level(flags: frozenset[str]) -> str | None:
        monkeypatch.setattr(compiled_module, "_cpu_flags", lambda: flags)
        found = compiled.__wrapped__(source)
        return None if found is None else Path(found._name).name.split("-")[found.one()]

    monkeypatch.setenv("CXX", "missing")
    assert level(best | {"more"}) == "bf16"
    assert level(best - {"avx512_bf16"}) == "v4"
    # Of AVX-512 all that compilers take for granted, or none.
    assert level(best - {"avx512dq"}) == level(LEVELS[2].flags) == "v3"
    for missing in LEVELS[2].flags:
        assert level(best - {missing}) is None
    assert level(frozenset()) is None
    # Nor one that is damaged, or was made of other code.
    (library,) = ahead.glob("*bf16*")
    library.write_bytes(library.read_bytes()[:-1])
    assert level(best) == "v4"
    source.write_text(f'extern "C" {ONE}\n')
    assert level(best) is None
    monkeypatch.delenv("CXX")
    built(source)
    assert kept(source)


def test_users_who_share_a_cache_keep_their_own_libraries(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_text(f'extern "C" {ONE}')
    built(source)
    mine = os.geteuid()
    cache = source.parent / "cache"
    cache.chmod(0o777)
    (cache / f"native-{mine}").rename(cache / f"native-{mine + 7}")
    built(source)
    assert {path.name for path in cache.iterdir()} == {f"native-{mine}", f"native-{mine + 7}"}
