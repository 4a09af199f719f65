"""How C++ is compiled and kept, and what runs where it cannot be."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernel_cases import DEVICE, needs, random_entries, random_tiles
from padst_kernels import entries, tiles
from padst_kernels.compiled import compiled

ONE = "int one() { return 1; }\n"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a library may be written, with an empty cache, if there is a compiler."""
    needs("native")
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "kernel.cpp"


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
    assert "plain PyTorch instead: PADST_NATIVE is 0" in caplog.text


def test_no_compiler_no_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text(ONE)
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert compiled(source) is None
    assert "plain PyTorch instead" in caplog.text


def test_no_home_directory_no_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PADST_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    # As of a user whom the system does not know.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    source = tmp_path / "kernel.cpp"
    source.write_text(ONE)
    assert compiled(source) is None
    assert "instead: Could not determine home directory." in caplog.text


def test_says_why_the_compiler_refuses(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    source.write_text('#include "wrong.h"\n')
    source.with_name("wrong.h").write_text("int one() { return two; }\n")
    assert compiled(source) is None
    assert "error: " in caplog.text and "In file included" not in caplog.text


def test_a_library_is_built_once_for_each_version_of_its_files(
    source: Path, tmp_path: Path
) -> None:
    header, cache = source.with_name("one.h"), tmp_path / "cache"
    source.write_text('#include "one.h"\nextern "C" int one() { return ONE; }\n')
    header.write_text("#define ONE 1\n")

    def built() -> dict[Path, int]:
        # As in another process.
        library = compiled.__wrapped__(source)
        assert library is not None
        return {path: path.stat().st_mtime_ns for path in cache.iterdir()}

    first = built()
    assert len(first) == 1 and built() == first
    header.write_text("#define ONE 2\n")
    second = built()
    assert len(second) == 2 and second.items() > first.items()
