"""Files that this user may not read or write, and names in letters that this locale has not."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuzz.program import Reached, contents, fault
from padst_exp import analyze, evaluate, export, train
from padst_exp.config import config_dir
from padst_exp.engine import loop

NOBODY = 65534
TINY = ["logger=none", "backend=torch", "device=cpu", "trainer.workers=0", "trainer.steps=1",
        "trainer.epochs=null", "trainer.batch_size=2", "sparsity=0.5"]  # fmt: skip
VIT = [*TINY, "model=vit", "model.dim=16", "model.depth=1", "model.heads=2"]
GPT = [*TINY, "model=gpt2", "model.dim=16", "model.depth=1", "model.heads=2"]
IMAGES = [*VIT, "dataset=imagenet1k", "dataset.num_classes=2", "dataset.image_size=32",
          "model.patch_size=8"]  # fmt: skip


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """As a user who owns nothing; where that is this one already, file modes suffice."""
    if os.geteuid() != 0:
        yield
        return
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody can reach; pytest's own is closed."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    with nobody():
        reachable = all(os.access(part, os.R_OK) for part in (config_dir(), Path(np.__file__)))
    if not reachable:
        pytest.skip("another user cannot read this installation")
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o777)
    shutil.rmtree(folder)


def opened(folder: Path) -> None:
    """Let everybody read and write what lies there, in files that others may own."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)


def images(root: Path, *labels: str) -> None:
    for split in ("train", "val"):
        for label in labels:
            (root / split / label).mkdir(parents=True)
            pixels = np.full((40, 36, 3), 7, np.uint8)
            for number in range(4):
                Image.fromarray(pixels).save(root / split / label / f"ö{number}.jpg")


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise Reached

    monkeypatch.setattr(loop, "run", run)


Program = tuple[Callable[[], None], list[str]]


@pytest.mark.usefixtures("stopped")
def test_what_may_not_be_read_is_one_line(place: Path, real_run: Path) -> None:
    run, text, root = place / "run", place / "a.txt", place / "images"
    shutil.copytree(real_run, run)
    (run / "export").mkdir()
    text.write_text("some words and more of them\n" * 99)
    images(root, "a", "b")
    weights = place / "w.safetensors"
    weights.write_bytes(b"x" * 99)
    opened(place)
    mine = ["runs=runs", "name=x"]
    words = [*GPT, "dataset=text_file", f"dataset.path={text}", "dataset.vocab_size=260",
             "dataset.context_length=8", *mine]  # fmt: skip
    programs: dict[str, tuple[Program, str]] = {
        "checkpoints/best.pt": ((evaluate.main, ["run=run", "device=cpu"]), ""),
        "checkpoints/last.pt": ((train.main, [*VIT, *mine, "init_from=run/checkpoints/last.pt"]),
                                "init_from: "),
        "checkpoints": ((export.main, ["run=run", "device=cpu", "out=out"]), ""),
        ".": ((analyze.main, ["run=run", "device=cpu"]), ""),
        "../a.txt": ((train.main, words), "dataset.path: "),
        "../images/train": ((train.main, [*IMAGES, "dataset.root=images", *mine]), "dataset."),
        "../images/val/a": ((train.main, [*IMAGES, "dataset.root=images", *mine]), "dataset."),
        "../w.safetensors": ((train.main, [*VIT, *mine, "model.checkpoint=w.safetensors"]),
                             "model.checkpoint: "),
    }  # fmt: skip
    (run / "checkpoints" / "best.pt").unlink()
    shutil.copy(run / "checkpoints" / "last.pt", run / "checkpoints" / "best.pt")
    opened(place)
    wrong = {}
    for name, ((main, arguments), expected) in programs.items():
        closed = run / name
        closed.chmod(0)
        others = run / "checkpoints" / "last.pt"
        if name == "checkpoints/best.pt":
            others.chmod(0)
        with nobody():
            found = fault(main, arguments, place, expected or "")
        for path in (closed, others):
            path.chmod(0o777 if path.is_dir() else 0o666)
        wrong[name] = found
    assert wrong == dict.fromkeys(programs), wrong


def test_a_run_that_may_not_be_written_is_read(place: Path, real_run: Path) -> None:
    run = place / "run"
    shutil.copytree(real_run, run)
    for path in [run, *run.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    place.chmod(0o555)
    before = contents(place)
    with nobody():
        for main, arguments, expected in (
            (evaluate.main, [], None),
            (export.main, [], "out: "),
            (analyze.main, ["parts=[cost]"], "out: "),
        ):
            found = fault(main, ["run=run", "device=cpu", *arguments], place, expected or "")
            assert found is None, (main.__module__, found)
        for resume in ("auto", "never"):
            arguments = [*VIT, "runs=.", "name=run", f"resume={resume}"]
            found = fault(train.main, arguments, place)
            assert found is None, (resume, found)
    assert contents(place) == before


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
CHILD = """
import json, sys
from pathlib import Path
from fuzz.program import fault
from padst_exp import analyze, evaluate, export, train
import torch
torch.set_num_threads(1)
mains = {one.__name__.rpartition(".")[2]: one.main for one in (analyze, evaluate, export, train)}
for name, arguments, expected in json.loads(sys.argv[1]):
    print(ascii((name, arguments[-1], fault(mains[name], arguments, Path.cwd(), expected))))
"""


def typed(argument: str) -> str:
    """As Python reads it from a command line in ASCII."""
    return argument.encode().decode("ascii", "surrogateescape")


@pytest.mark.slow
def test_letters_that_the_locale_has_not(tmp_path: Path, real_run: Path) -> None:
    """Beside names that it reads, or under names that only the operating system reads."""
    folder = tmp_path / "Übung 日本"
    run = Path(shutil.copytree(real_run, folder / "run"))
    (folder / "a.txt").write_text("Straße, 日本 und mehr davon\n" * 99, "utf-8")
    images(folder / "images", "é", "ü")
    words = ["dataset=text_file", "dataset.path=a.txt", "dataset.vocab_size=260",
             "dataset.context_length=8"]  # fmt: skip
    programs = [
        ("evaluate", ["device=cpu", "run=run"], ""),
        ("export", ["device=cpu", "run=run"], ""),
        ("evaluate", ["device=cpu", "run=run/export"], ""),
        ("analyze", ["device=cpu", "parts=[cost]", "run=run"], ""),
        ("train", [*GPT, *words, "name=text"], ""),
        ("train", [*IMAGES, "dataset.root=images", "name=images"], ""),
        ("train", [*IMAGES, "dataset.root=images", "name=images", "resume=auto"], ""),
        ("evaluate", ["device=cpu", "run=runs/images"], ""),
        ("train", [*VIT, "name='é'"], "runs/."),
        ("train", [*VIT, "name=x", "runs='日本'"], "日本: expected letters in ascii"),
        ("evaluate", [f"run='{run}'"], "run: "),
        ("train", [*VIT, typed("name='é'")], "name='é': expected letters in ascii"),
        ("evaluate", [typed(f"run='{run}'")], "run='"),
    ]  # fmt: skip
    (folder / "child.py").write_text(CHILD)
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, **ASCII, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "child.py", json.dumps(programs)], cwd=folder, env=environment,
        capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    found = done.stdout.splitlines()
    assert len(found) == len(programs), done.stderr[-2000:]
    assert all(line.endswith(", None)") for line in found), "\n".join(found)
