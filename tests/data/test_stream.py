"""Text tokenised while it is read: every document once a pass, and resumed where it was."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from door.test_every_file import byte_level
from engine.toy import assert_equal, start_ranks, toy_trainer
from from_yaml import from_yaml
from padst_exp.config import config_dir, results_config
from padst_exp.data import stream
from padst_exp.data.corpora import C4
from padst_exp.data.sampler import Batches, train_loader
from padst_exp.engine import checkpoint
from padst_exp.engine.distributed import World
from padst_exp.engine.loop import run
from padst_exp.engine.run_directory import RunDirectory
from padst_exp.errors import UserError
from padst_exp.train import build_experiment

DOCUMENTS = [f"the fox {number} jumps over {'a lazy dog ' * (number % 7)}" for number in range(90)]
STEPS, BATCH, LENGTH = 7, 12, 8


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stream, "ROWS", 8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A text in four files for training and one for validation, and a tokenizer."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        with gzip.open(folder / f"c4-train.{number:05d}-of-00004.json.gz", "wt") as file:
            for text in DOCUMENTS[number::4]:
                file.write(json.dumps({"text": text, "url": "x"}) + "\n")
    (folder / "c4-validation.json").write_text(json.dumps({"text": " ".join(DOCUMENTS)}))
    byte_level(tmp_path)
    return folder


def keys(root: Path, /, **changes: object) -> dict[str, Any]:
    vocab = {key: str(root.parent / name) for key, name in
             (("vocab", "vocab.json"), ("merges", "merges.txt"))}  # fmt: skip
    return {"root": str(root), "context_length": LENGTH, "streaming": True, "streams": 4,
            **vocab, **changes}  # fmt: skip


def task(root: Path, /, **changes: object) -> C4:
    made: C4 = from_yaml("dataset/c4", **keys(root, **changes))
    return made


def loader(task: C4, **changes: Any) -> Batches:
    usual = {"batch_size": BATCH, "micro_batches": 1, "start_step": 0, "total_steps": STEPS}
    return train_loader(
        task, **{**usual, "seed": 3, "rank": 0, "world_size": 1, "workers": 0, **changes}
    )


def tokens_of(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    return torch.cat([inputs for inputs, _ in batches]).flatten().tolist()


@pytest.mark.parametrize("streams", [2, 3])  # with files of their own, and without
def test_a_pass_has_every_document_once(root: Path, streams: int) -> None:
    made = task(root, streams=streams)
    read = loader(made, batch_size=streams, total_steps=420 // streams)
    first: list[list[int]] = [[] for _ in range(streams)]  # of blocks that end in the first pass
    with_last: list[list[int]] = [[] for _ in range(streams)]
    for inputs, targets in read:
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert read.position is not None
        for number, (tokens, place) in enumerate(zip(inputs, read.position, strict=True)):
            if place[0] == 0:
                first[number] += tokens.tolist()
            if place[0] == 0 or len(first[number]) == len(with_last[number]):
                with_last[number] += tokens.tolist()
    assert all(map(len, first))

    def documents(parts: list[list[int]]) -> list[str]:
        texts = [made.tokenizer.decode(part, skip_special_tokens=False) for part in parts]
        return [text for part in texts for text in part.split("<|endoftext|>")[:-1]]

    assert len(set(documents(first))) == len(documents(first))
    assert set(documents(with_last)) == set(DOCUMENTS)
    assert documents(first)[:20] != [text for text in DOCUMENTS if text in documents(first)[:20]]


def test_processes_and_micro_batches_do_not_change_a_batch(root: Path) -> None:
    made = task(root)
    straight = list(loader(made))
    assert tokens_of(list(loader(made, seed=4))) != tokens_of(straight)
    parts = list(loader(made, micro_batches=3))
    assert tokens_of(parts) == tokens_of(straight)
    for world_size in (2, 4):
        ranks = [loader(made, rank=rank, world_size=world_size) for rank in range(world_size)]
        for (whole, _), *shares in zip(straight, *ranks, strict=True):
            assert torch.equal(torch.cat([inputs for inputs, _ in shares]), whole)


@pytest.mark.parametrize("streams", [4, 3])  # with files of their own, and without
def test_a_stream_goes_on_where_it_was(root: Path, streams: int) -> None:
    made = task(root, streams=streams)
    whole = loader(made, total_steps=30)  # into the second pass
    straight, positions = [], [whole.position]
    for batch in whole:
        straight.append(batch)
        positions.append(whole.position)
    assert max(position[0, 0].item() for position in positions if position is not None) >= 1
    for start in (1, 13, 29):
        rest = loader(made, total_steps=30, start_step=start, position=positions[start])
        assert len(rest) == 30 - start
        assert tokens_of(list(rest)) == tokens_of(straight[start:])
        made.train.require_position(positions[start])


@pytest.mark.thorough  # a process that is not forked imports everything
def test_a_worker_reads_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ROWS", 256)  # as another process has it
    made = task(root)
    straight = list(loader(made))
    other = loader(made, workers=3)
    assert tokens_of(list(other)) == tokens_of(straight)
    assert other.position is not None
    rest = loader(made, workers=1, start_step=STEPS, total_steps=STEPS + 2, position=other.position)
    assert tokens_of(list(rest)) == tokens_of(list(loader(made, total_steps=STEPS + 2))[STEPS:])


def config(root: Path, runs: Path, *overrides: str) -> Any:
    data = [f"dataset.{key}={value}" for key, value in keys(root).items()]
    small = ["model=gpt2", "dataset=c4", "model.dim=16", "model.depth=1", "model.heads=2"]
    steps = ["trainer.epochs=null", f"trainer.steps={STEPS}", f"trainer.batch_size={BATCH}",
             "trainer.eval_interval=null", "trainer.checkpoint_interval=2",
             "trainer.precision=float32"]  # fmt: skip
    rest = ["sparsity=0.5", "structure=nm", "permutation=none", "dst=static", "backend=torch",
            "logger=none", "device=cpu", "trainer.workers=0", "trainer.micro_batches=1",
            f"runs={runs}"]  # fmt: skip
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", [*small, *data, *steps, *rest, *overrides])


def trained(
    root: Path, name: str, *overrides: str, world: World | None = None, fail_at: int | None = None
) -> dict[str, Any]:
    """The last checkpoint of a run."""
    cfg, world = config(root, root.parent / "runs", *overrides), world or World()
    directory = RunDirectory.open(
        root.parent / "runs", name, world, resume="auto", config=results_config(cfg),
        config_text=OmegaConf.to_yaml(cfg, resolve=True), overrides=[],
    )  # fmt: skip
    experiment = build_experiment(cfg, world)
    if fail_at is not None:
        step, calls = experiment.task.loss, itertools.count(1)

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            if torch.is_grad_enabled() and next(calls) == fail_at:
                raise ConnectionError("power cut")
            return step(logits, targets)

        experiment.task.loss = loss  # type: ignore[method-assign]
        with pytest.raises(ConnectionError):
            run(experiment, directory, world)
    else:
        run(experiment, directory, world)
    return checkpoint.read(directory.checkpoints.last)


def test_a_resumed_run_is_bitwise_a_straight_one(root: Path) -> None:
    parts = "trainer.micro_batches=2"
    straight = trained(root, "straight", parts)
    # Amid a step: one of its two micro-batches was taken from the stream.
    cut = trained(root, "cut", parts, fail_at=8)
    assert cut["step"] == 3
    resumed = trained(root, "cut", parts)
    for part in ("model", "optimizer", "topology", "random", "stream", "losses"):
        assert_equal(straight[part], resumed[part], part)
    assert list(straight["stream"].shape) == [4, stream.POSITION]
    assert "training" not in straight["data"]


@pytest.mark.thorough
def test_other_text_and_damaged_positions_are_refused(root: Path) -> None:
    cut = trained(root, "cut", fail_at=3)
    path = root.parent / "runs" / "cut" / "checkpoints" / "last.pt"
    position = cut["stream"]
    for odd in (None, [], position[:-1], position.double(), position - 1, position + 2**31):
        checkpoint.write({**cut, "stream": odd}, path)
        with pytest.raises(UserError, match=r"last\.pt: damaged, its stream does not fit") as error:
            trained(root, "cut")
        assert "\n" not in str(error.value)
    checkpoint.write(cut, path)
    first = root / "c4-train.00000-of-00004.json.gz"
    first.write_bytes(gzip.compress(json.dumps({"text": DOCUMENTS[0]}).encode()))
    with pytest.raises(UserError, match="other data than before"):
        trained(root, "cut")


def _train(world: World, root: str) -> None:
    stream.ROWS = 8
    trained(Path(root), "ranks", world=world)


@pytest.mark.thorough
def test_ranks_save_the_position_of_all_streams(root: Path) -> None:
    straight = trained(root, "straight")
    for process in start_ranks(_train, str(root), ranks=2):
        process.join()
        assert process.exitcode == 0
    saved = checkpoint.read(root.parent / "runs" / "ranks" / "checkpoints" / "last.pt")
    assert torch.equal(saved["stream"], straight["stream"])
    assert saved["losses"] == pytest.approx(straight["losses"], rel=1e-4)


def test_what_does_not_fit_a_stream_names_its_key(root: Path) -> None:
    cases: dict[str, dict[str, object]] = {
        r"^dataset\.streams: expected at least 1, got 0$": {"streams": 0},
        r"^dataset\.documents: expected null with .* got 5$": {"documents": 5},
        r"^dataset\.root: expected .* got gone$": {"root": "gone"},
    }
    for message, changes in cases.items():
        with pytest.raises(UserError, match=message):
            task(root, **changes)
    made = task(root)
    for changes in ({"batch_size": 10}, {"world_size": 3}, {"world_size": 12}):
        with pytest.raises(UserError, match=r"^dataset\.streams: expected a multiple of .* got 4$"):
            loader(made, **changes)
    with pytest.raises(UserError, match=r"^trainer\.epochs: expected null, and trainer\.steps=.*"):
        toy_trainer(steps=None, epochs=1).total_steps(made.samples)


def test_files_that_hold_no_text_are_one_line(root: Path) -> None:
    import datasets

    first, later = sorted(root.glob("c4-train*"))[:2]
    whole = first.read_bytes()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[:9])
    cases = (b"", whole[:-30], gzip.compress(b""), gzip.compress(b"{"), b"x",
             gzip.compress(b"null"),
             gzip.compress(b'{"words": "a"}\n'), gzip.compress(b'{"text": 5}\n'),
             gzip.compress(f'{rows}{{"text": null}}\n'.encode()),
             gzip.compress(b'{"text": " "}\n'))  # fmt: skip
    for path, content in itertools.product((first, later), cases):
        sound = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^dataset\.root: expected ") as error:
            list(loader(task(root), total_steps=60))
        line = str(error.value)
        assert line.isprintable()
        assert len(line) < 500
        assert str(root) in line
        path.write_bytes(sound)
    for path in root.glob("c4-train*"):
        path.unlink()
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(root / "train.parquet")
    made = task(root, streams=2)
    assert np.isin(tokens_of(list(loader(made))), range(280)).all()
    assert made.describe()["fingerprint"] != task(root, streams=4).describe()["fingerprint"]
