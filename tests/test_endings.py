"""Whole programs, as users start them, and what is left of them when they are told to end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from padst_exp.engine import checkpoint
from padst_exp.engine.records import read_metrics

ROOT = Path(__file__).parents[1]
ENDINGS = int(os.environ.get("ENDINGS", "1"))
TINY = ("model.dim=32", "model.depth=2", "model.heads=2", "sparsity=0.5", "permutation=none")
ENDLESS = (
    *("trainer.epochs=null", "trainer.steps=1000000", "trainer.batch_size=8"),
    *("trainer.micro_batches=1", "trainer.log_interval=1", "device=cpu", "backend=torch"),
)
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command in a group of its own, none of which outlives the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*command: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(str(ROOT / part) for part in ("src", "kernels"))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment |= {"PADST_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
        environment.pop("WANDB_MODE", None)  # the default recipe logs there, offline
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_rows(run: Path, process: subprocess.Popen[bytes], count: int) -> None:
    deadline = time.monotonic() + 240
    while len(read_metrics(run / "metrics.jsonl")) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.02)


def group(pid: int) -> set[int]:
    """All living processes of a group."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(pgrp) == pid and state not in "ZX":
            found.add(int(path.parent.name))
    return found


def images(root: Path) -> str:
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in "abcd":
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.jpg")
    return f"dataset.root={root}"


def texts(root: Path) -> tuple[str, str]:
    root.mkdir()
    words = ["a", "b", "c", "<|endoftext|>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(root / "tokenizer.json"))
    for split, lines in (("train", 400), ("valid", 40)):
        (root / f"wiki.{split}.raw").write_text(" a b c a c b\n" * lines)
    return f"dataset.root={root}", f"dataset.vocab={root / 'tokenizer.json'}"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ENDINGS))
def test_the_recipes_of_papers_survive_sigterm_to_the_group(
    tmp_path: Path, start: Start, number: int
) -> None:
    """With all the data workers, and the logger, that they have by default."""
    size = ("dataset.num_classes=4", "dataset.image_size=32", "model.patch_size=8")
    imagenet = ("model=deit_tiny", "dataset=imagenet1k", images(tmp_path / "images"), *size)
    context = ("dataset.context_length=16", "model.dropout=0.0")
    wikitext = ("model=gpt2", "dataset=wikitext103", *texts(tmp_path / "texts"), *context)
    python = (sys.executable, "-m", "padst_exp.train")
    for name, data in (("imagenet", imagenet), ("wikitext", wikitext)):
        process = start(*python, f"name={name}", *data, *TINY, *ENDLESS)
        run = tmp_path / "runs" / name
        wait_for_rows(run, process, 3 + number)
        for _ in range(2):  # as GNU timeout does: to its child, then to the group
            os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[1].decode()
        assert process.returncode == 143, said
        assert "interrupted at step" in said and "Traceback" not in said and "warning" not in said
        assert checkpoint.read(run / "checkpoints" / "last.pt")["step"] >= 3 + number
        assert not (run / "lock.json").exists()
        assert not group(process.pid)


@pytest.mark.slow
def test_ranks_of_torchrun_save_what_a_scheduler_cuts_short(tmp_path: Path, start: Start) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    train = ("-m", "padst_exp.train", "name=pair", "logger=none", *TINY, *ENDLESS)
    process = start(sys.executable, *launcher, *train)
    run = tmp_path / "runs" / "pair"
    wait_for_rows(run, process, 3)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1].decode()
    assert "interrupted at step" in said
    saved = checkpoint.read(run / "checkpoints" / "last.pt")
    assert saved["step"] >= 3 and len(saved["random"]) == 2


@pytest.mark.slow
def test_nobody_who_stops_reading_ends_a_run(tmp_path: Path, start: Start) -> None:
    train = f"{sys.executable} -m padst_exp.train logger=none {' '.join((*TINY, *ENDLESS))}"
    commands = {
        "head": f"{train} name=head 2>&1 | head -n 1",
        "full": f"exec {train} name=full 2> /dev/full",
        "closed": f"exec {train} name=closed >&- 2>&-",
    }
    started = {name: start("bash", "-c", line) for name, line in commands.items()}
    for name, process in started.items():
        run = tmp_path / "runs" / name
        wait_for_rows(run, process, 40)
        os.killpg(process.pid, signal.SIGHUP)
        process.wait(60)
        deadline = time.monotonic() + 30
        while not (run / "checkpoints" / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        step = checkpoint.read(run / "checkpoints" / "last.pt")["step"]
        rows = [json_row["step"] for json_row in read_metrics(run / "metrics.jsonl")]
        assert step >= max(rows) >= 39
