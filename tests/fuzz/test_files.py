"""Whatever has become of a file: the program that reads it takes it, or refuses it in one line."""

from __future__ import annotations

import gzip
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from door.test_every_file import WORDS, byte_level, idx, rows, shard
from door.test_stored_configs import PLANTED
from from_yaml import asked, leaf
from fuzz.damage import RAN, damages
from fuzz.program import Reached, fault
from fuzz.test_command_lines import DRAWS, SEED
from hostile import trained_run
from padst_exp import analyze, evaluate, export, train
from padst_exp.bench import __main__ as bench
from padst_exp.bench import layers, suites
from padst_exp.config import build, config_dir
from padst_exp.engine.distributed import World

OLD = ["device=cpu", "run=run"]
VIT = ["model=vit", "model.dim=16", "model.depth=1", "model.heads=2"]
GPT = ["model=gpt2", "model.dim=16", "model.depth=1", "model.heads=2", "dataset.context_length=8"]
QUICK = ["logger=none", "sparsity=0.5", "backend=torch", "device=cpu", "trainer.steps=1",
         "trainer.epochs=null", "trainer.batch_size=4", "trainer.workers=0", "runs=runs",
         "trainer.micro_batches=1"]  # fmt: skip
# As `trained_run` has it.
AGAIN = [*VIT, "sparsity=0.5", "backend=torch", "trainer.steps=3", "trainer.eval_interval=3",
         "trainer.batch_size=16", "structure=nm", "logger=none", "device=cpu", "trainer.workers=0",
         "runs=going", "name=run", "resume=auto"]  # fmt: skip
IMAGES = [*VIT, *QUICK, "dataset=imagenet1k", "dataset.num_classes=2", "dataset.image_size=32",
          "model.patch_size=8"]  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A program that reads files.

    Args:
        main: its entry point.
        arguments: with which it takes the sound files.
        files: patterns of those that it reads.
    """

    main: Callable[[], None]
    arguments: list[str]
    files: tuple[str, ...]


RUN = ("run/config.yaml", "run/*.json*", "run/checkpoints/*.pt", "run/checkpoints/*.pt")
READERS = {
    "evaluate": Reader(evaluate.main, OLD, RUN),
    "evaluate a checkpoint": Reader(evaluate.main, ["device=cpu", "run=lone.pt"], ("lone.pt",)),
    "evaluate an export": Reader(
        evaluate.main, ["device=cpu", "run=run/export"], ("run/export/*", "run/export/*")
    ),
    "export": Reader(export.main, [*OLD, "out=out"], RUN),
    "analyze": Reader(analyze.main, [*OLD, "parts=[cost,topology]"], RUN),
    "resume": Reader(train.main, AGAIN, ("going/run/*.*", "going/run/checkpoints/*.pt")),
    "skip": Reader(train.main, [*AGAIN, "runs=."], ("run/config.yaml", "run/summary.json")),
    "init_from a run": Reader(train.main, [*VIT, *QUICK, "init_from=run"], RUN),
    "init_from an export": Reader(
        train.main, [*VIT, *QUICK, "init_from=run/export"], ("run/export/*",)
    ),
    "init_from weights": Reader(train.main, [*VIT, *QUICK, "init_from=w.pt"], ("w.pt",)),
    "init_values": Reader(
        train.main, [*VIT, *QUICK, "init_values=w.safetensors"], ("w.safetensors",)
    ),
    "init_topology": Reader(
        train.main, [*VIT, *QUICK, "structure=nm", "init_topology=lone.pt"], ("lone.pt",)
    ),
    "init_permutation": Reader(train.main, [*VIT, *QUICK, "init_permutation=run"], RUN),
    "text": Reader(
        train.main,
        [*GPT, *QUICK, "dataset=text_file", "dataset.path=t.txt", "dataset.vocab_size=260"],
        ("t.txt",),
    ),
    "packed text": Reader(
        train.main,
        [*GPT, *QUICK, "dataset=text_file", "dataset.path=t.txt.gz", "dataset.vocab_size=260"],
        ("t.txt.gz",),
    ),
    "wikitext": Reader(
        train.main,
        [
            *GPT,
            *QUICK,
            "dataset=wikitext103",
            "dataset.root=wiki",
            "dataset.vocab=vocab.json",
            "dataset.merges=merges.txt",
        ],
        ("wiki/*", "vocab.json", "merges.txt"),
    ),
    "stream": Reader(
        train.main,
        [
            *GPT,
            *QUICK,
            "dataset=c4",
            "dataset.streaming=true",
            "dataset.streams=2",
            "dataset.root=corpus",
            "dataset.vocab=vocab.json",
            "dataset.merges=merges.txt",
        ],
        ("corpus/*",),
    ),
    "fashion": Reader(
        train.main, [*VIT, *QUICK, "dataset=fashion_mnist", "dataset.root=fashion"], ("fashion/*",)
    ),
    "cifar": Reader(
        train.main,
        [*VIT, *QUICK, "dataset=cifar100", "dataset.root=cifar-100-python"],
        ("cifar-100-python/*",),
    ),
    "images": Reader(train.main, [*IMAGES, "dataset.root=images"], ("images/*/*/*",)),
    "shards": Reader(train.main, [*IMAGES, "dataset.root=shards"], ("shards/*",)),
    "parquet": Reader(train.main, [*IMAGES, "dataset.root=hub"], ("hub/*",)),
    "bench": Reader(bench.main, ["suite=memory", "out=tables"], ("tables/*",)),
    "own file": Reader(train.main, ["--config-dir=own", "+mine=here", *VIT, *QUICK], ("own/*/*",)),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound file of every kind that a program reads."""
    root = tmp_path_factory.mktemp("sound")
    run, going = trained_run(root), root / "going" / "run"
    shutil.copytree(run, going)
    (going / "summary.json").unlink()
    shutil.copy(run / "checkpoints" / "last.pt", root / "lone.pt")
    assert fault(export.main, OLD, root) is None
    shape = {"image_size": 8, "channels": 1, "num_classes": 10}
    small = {"patch_size": 4, "dim": 16, "depth": 1, "heads": 2}
    state = build(leaf("model/vit", **small), "model", shape).state_dict()
    torch.save(state, root / "w.pt")
    save_file(state, root / "w.safetensors")
    _texts(root)
    _images(root)
    (root / "tables").mkdir()
    (table,) = (config_dir().parent / "results" / "kernels").glob("memory-*.csv")
    shutil.copy(table, root / "tables" / "memory-elsewhere-float32.csv")
    (root / "tables" / "README.md").write_text("By hand.\n")
    (root / "own" / "mine").mkdir(parents=True)
    (root / "own" / "mine" / "here.yaml").write_text("# @package trainer\nlog_interval: 1\n")
    return root


def _texts(root: Path) -> None:
    (root / "t.txt").write_text(WORDS)
    (root / "t.txt.gz").write_bytes(gzip.compress(WORDS.encode()))
    (root / "corpus").mkdir()
    (root / "wiki").mkdir()
    for split in ("train", "valid"):
        (root / "wiki" / f"{split}.txt").write_text(WORDS)
        (root / "corpus" / f"{split}.jsonl").write_text(rows(WORDS))
    byte_level(root)


def _images(root: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("fashion", "cifar-100-python", "hub", "shards"):
        (root / name).mkdir()
    for split, number in (("train", 30), ("t10k", 20)):
        pixels = rng.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        (root / "fashion" / f"{split}-images-idx3-ubyte").write_bytes(idx(pixels))
        labels = np.arange(number, dtype=np.uint8) % 10
        (root / "fashion" / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    for split in ("train", "test"):
        table = {b"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
                 b"fine_labels": list(range(20))}  # fmt: skip
        (root / "cifar-100-python" / split).write_bytes(pickle.dumps(table))
    for split in ("train", "val"):
        cells = []
        for label in ("a", "b"):
            folder = root / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
                cells.append({"bytes": (folder / f"{number}.png").read_bytes(), "path": None})
        rows = pa.table({"image": cells, "label": [0, 0, 1, 1]})
        pq.write_table(rows, root / "hub" / f"{split}-00000.parquet")
        shard(root / "images" / split, root / "shards" / f"{split}-00000.tar")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed: what bench has read before is what matters."""

    def run(*_: object) -> Iterator[object]:
        raise Reached

    session = suites.Session  # of which only the columns are asked for
    columns = {"device": "here", "threads": 1, "dtype": "float32"}
    blank = dict.fromkeys(("timer", "dtype", "autocast", "ceilings", "rounds", "say"))
    monkeypatch.setattr(suites, "start", lambda *_: session(columns=columns, **blank))
    for suite in (layers, suites.models):
        monkeypatch.setattr(suite, "run", run)


@pytest.fixture
def planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound: Path
) -> Iterator[Callable[[], bool]]:
    """Whether any code of a stranger's has run."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("planted", "padst_exp_planted"):
        (home / f"{name}.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(home)
    yield lambda: (home / RAN).exists() or (tmp_path / "drawn" / RAN).exists()
    sys.modules.pop("planted", None)


@pytest.mark.usefixtures("measured")
def test_damaged_files_are_taken_or_refused_in_one_line(
    sound: Path, tmp_path: Path, planted: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = tmp_path / "drawn", []
    evaluated = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a: found.append(evaluated(*a)) or found[-1])
    expected = evaluated(
        asked("evaluate", evaluate.EvaluateSchema, run=str(sound / "run"), device="cpu"),
        World(),
    )[1]

    @seed(SEED)
    @settings(
        max_examples=DRAWS // 3,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(READERS)))
        reader = READERS[name]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        done = []
        for _ in range(data.draw(st.sampled_from([1, 1, 2]))):
            pattern = data.draw(st.sampled_from(sorted(set(reader.files))))
            path = data.draw(st.sampled_from(sorted(p for p in sound.glob(pattern) if p.is_file())))
            what, damage = data.draw(damages(path))
            place = folder / path.relative_to(sound)
            if place.is_file() and not place.is_symlink():
                damage(place)
                done.append(f"{path.relative_to(sound)}: {what}")
        found.clear()
        wrong = fault(reader.main, reader.arguments, folder)
        assert wrong is None, (name, done, wrong)
        assert not planted(), (name, done)
        # No weights of a checkpoint change without a word.
        if name in ("evaluate", "evaluate a checkpoint") and found:
            assert found[0][1] == pytest.approx(expected, rel=1e-5), (name, done)

    check()


@pytest.mark.thorough
@pytest.mark.usefixtures("measured")
def test_programs_take_sound_files(sound: Path, tmp_path: Path) -> None:
    for name, reader in READERS.items():
        folder = Path(shutil.copytree(sound, tmp_path / name.replace(" ", "-")))
        # A refusal would be another line.
        assert fault(reader.main, reader.arguments, folder, "never") == "accepted", name
