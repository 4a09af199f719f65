"""What pip makes of a checkout runs anywhere: another folder, another CPU, without a compiler."""

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kernel_cases import assert_agrees, random_entries, random_tiles
from padst_kernels import compiled as compiled_module
from padst_kernels import entries, tiles
from padst_kernels.compiled import LEVELS, compiled

pytest.importorskip("hatchling", reason="builds wheels; `make setup` installs it")

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
# Which instructions a level must not have.
BEYOND = {"v3": r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])", "v4": r"\tv\w*bf16"}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What a command printed, which had to succeed."""
    ended = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder)
    (archive,) = folder.iterdir()
    return archive


def wheel(sdist: Path, folder: Path, **environment: str) -> Path:
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist, **environment)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def site(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a wheel made of the source archive is installed."""
    if platform.machine() != "x86_64" or shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no compiler, or none that knows the levels of x86-64")
    archive = wheel(sdist, tmp_path_factory.mktemp("wheels"))
    assert archive.name.endswith("-py3-none-linux_x86_64.whl")
    folder = tmp_path_factory.mktemp("site")
    run(*PIP, "install", "--no-deps", "--no-index", "--target", folder, archive)
    return folder


@pytest.mark.docs
@pytest.mark.thorough
def test_a_wheel_made_of_a_source_archive_trains_in_any_folder_without_a_compiler(
    site: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {
        "PYTHONPATH": str(site), "PADST_CACHE": str(tmp_path / "cache"), "CXX": "missing"
    }  # fmt: skip
    program = site / "bin" / "padst-train"
    short = ("trainer.epochs=null", "trainer.steps=3", "trainer.batch_size=16", "logger=none")
    said = run(program, "structure=nm", "name=own", *short, cwd=elsewhere, **environment)
    assert "by native" in said and "no compiled CPU kernels" not in said
    assert not list((tmp_path / "cache").glob("native-*"))
    run(program, "model=gpt2", "dataset=shakespeare", "name=text", *short,
        cwd=elsewhere, **environment)  # fmt: skip
    module = (sys.executable, "-m")
    run(*module, "padst_exp.evaluate", "run=runs/own", cwd=elsewhere, **environment)
    run(*module, "padst_exp.report", cwd=elsewhere, **environment)
    run(site / "bin" / "padst-bench", "--help", cwd=elsewhere, **environment)


@pytest.mark.thorough
def test_a_wheel_without_compiler_has_every_file_and_goes_anywhere(
    sdist: Path, tmp_path: Path
) -> None:
    archive = wheel(sdist, tmp_path / "wheels", CXX="missing")
    assert archive.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(archive) as opened:
        there = {name for name in opened.namelist() if ".dist-info/" not in name}
    sources = {"src/padst_exp", "src/hydra_plugins", "kernels/padst_kernels", "conf"}
    wanted = set()
    for name in run("git", "ls-files").splitlines():
        for folder in sources:
            if name.startswith(f"{folder}/"):
                home = "padst_exp/conf" if folder == "conf" else Path(folder).name
                wanted.add(home + name.removeprefix(folder))
    assert there == wanted


@pytest.mark.thorough
def test_no_level_has_instructions_of_a_higher_one(site: Path) -> None:
    ahead = site / "padst_kernels" / "ahead"
    for name, beyond in BEYOND.items():
        for library in ahead.glob(f"*-{name}-*"):
            assert not re.search(beyond, run("objdump", "-d", "--no-show-raw-insn", library))
    # What is looked for is found where it may be.
    for library in ahead.glob("*-bf16-*"):
        code = run("objdump", "-d", "--no-show-raw-insn", library)
        assert all(re.search(beyond, code) for beyond in BEYOND.values())


@pytest.mark.thorough
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_every_level_multiplies_as_the_reference(
    level: compiled_module.Level, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not level.flags <= compiled_module._cpu_flags():
        pytest.skip("this CPU has no such instructions")
    monkeypatch.setattr(compiled_module, "AHEAD", site / "padst_kernels" / "ahead")
    monkeypatch.setattr(compiled_module, "_cpu_flags", lambda: level.flags)
    for module, name in ((tiles.native, "library"), (entries.native, "functions")):
        monkeypatch.setattr(module, "compiled", compiled.__wrapped__)
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    assert level.name in compiled.__wrapped__(compiled_module.sources()[0])._name
    for dtype in tiles.native._TYPES:
        for permuted in (False, True):
            tiled = random_tiles(70, 5, 33, 69, 5, 341, permuted)
            x = tiled.x(19, dtype=dtype)
            assert_agrees(tiled.product("native"), tiled.reference, x, tiled.weight.to(dtype))
        single = random_entries((67, 41), 300, 5)
        x = single.x(19, dtype=dtype)
        assert_agrees(single.product("native"), single.reference, x, single.values.to(dtype))
