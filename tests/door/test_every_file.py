"""Every kind of file that a user can name, damaged in every way: one line that names it."""

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

from from_yaml import from_yaml, leaf
from hostile import DAMAGED, undone
from padst_exp.config import build
from padst_exp.data.sampler import train_loader
from padst_exp.errors import UserError

WORDS = "the quick brown fox jumps over a lazy dog\n" * 60
# Whatever is UTF-8 and not empty is a text.
NO_TEXT = {
    "empty", "a pointer of Git LFS", "another encoding", "a folder", "a dangling link",
    "a link to itself", "a pipe", "no end", "missing",
}  # fmt: skip
# What may be absent is so when something else has its name.
NO_FILE = {"a folder", "a dangling link", "a link to itself", "a pipe", "no end", "missing"}
# Of what has no digest, some damage cannot be told.
NO_DIGEST = set(DAMAGED) - {"flipped bytes", "a little short"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PADST_CACHE", str(tmp_path / "cache"))


def complaints(
    files: dict[Path, set[str]], read: Callable[[], object], *, root: Path | None = None
) -> list[str]:
    """What is wrong with how `read` takes damaged `files`; one line is nothing wrong.

    Args:
        files: each with the damages that it cannot be read with.
        read: reads all of them.
        root: a folder that the message may name instead.
    """
    read()
    wrong = []
    for path, damages in files.items():
        sound = path.read_bytes()
        for what in sorted(damages):
            DAMAGED[what](path)
            try:
                read()
                wrong.append(f"{path.name} is {what}: read")
            except UserError as error:
                line = str(error)
                named = str(path) in line or (root is not None and str(root) in line)
                if "\n" in line or len(line) > 700 or not named:
                    wrong.append(f"{path.name} is {what}: {line}")
            except Exception as error:
                wrong.append(f"{path.name} is {what}: {error!r}"[:300])
            undone(path, sound)
    return wrong


def byte_level(folder: Path) -> dict[str, Path]:
    """The files of a tokenizer in GPT-2's format, and as a whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>"], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([WORDS], trainer)
    vocab, merges = map(Path, tokenizer.model.save(str(folder)))
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"vocab": vocab, "merges": merges, "whole": folder / "tokenizer.json"}


def test_texts_and_vocabularies(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_text(WORDS)
    packed.write_bytes(gzip.compress(WORDS.encode()))
    found = []
    for file, damages in ((plain, NO_TEXT), (packed, set(DAMAGED))):
        found += complaints(
            {file: damages},
            lambda file=file: from_yaml(  # type: ignore[misc]
                "dataset/text_file", path=str(file), vocab_size=260, context_length=8
            ),
        )
    root, own = tmp_path / "root", byte_level(tmp_path)
    root.mkdir()
    splits = {root / f"{split}.txt": NO_TEXT for split in ("train", "valid")}
    for file in splits:
        file.write_text(WORDS)

    def corpus(vocab: Path, merges: Path | None) -> object:
        files = {"vocab": str(vocab), "merges": merges and str(merges)}
        return from_yaml("dataset/wikitext103", root=str(root), context_length=8, **files)

    found += complaints(splits, lambda: corpus(own["vocab"], own["merges"]), root=root)
    found += complaints(
        {own["vocab"]: NO_DIGEST, own["merges"]: NO_DIGEST},
        lambda: corpus(own["vocab"], own["merges"]),
    )
    documents = tmp_path / "corpus" / "train.jsonl"
    documents.parent.mkdir()
    for file in (documents, documents.with_name("valid.jsonl")):
        file.write_text(rows(WORDS))

    def streamed() -> None:
        keys = {"root": str(documents.parent), "vocab": str(own["whole"]), "context_length": 8}
        task = from_yaml("dataset/c4", **keys, streaming=True, streams=1)
        loader = train_loader(
            task, batch_size=8, micro_batches=1, start_step=0, total_steps=9, seed=0, rank=0,
            world_size=1, workers=0,
        )  # fmt: skip
        assert len(list(loader)) == 9

    # Half of it happens to end with a line.
    found += complaints({documents: NO_DIGEST - {"half"}}, streamed, root=documents.parent)
    found += complaints({own["whole"]: NO_DIGEST}, lambda: corpus(own["whole"], None))
    assert not found, "\n".join(found)


def rows(text: str) -> str:
    """Lines of a text as documents of a corpus."""
    return "".join(json.dumps({"text": line}) + "\n" for line in text.splitlines())


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim])
    return head + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def shard(folder: Path, path: Path) -> None:
    """The images of class folders, as WebDataset has them."""
    with tarfile.open(path, "w") as tar:
        for label, name in enumerate(sorted(folder.iterdir())):
            for image in sorted(name.iterdir()):
                text = str(label).encode()
                for suffix, content in ((image.suffix, image.read_bytes()), (".cls", text)):
                    info = tarfile.TarInfo(f"{name.name}{image.stem}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def test_images(tmp_path: Path) -> None:
    folder, found = tmp_path / "fashion", []
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, number in (("train", 30), ("t10k", 20)):
        pixels = rng.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(pixels))
        labels = np.arange(number, dtype=np.uint8) % 10
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    files = {path: NO_DIGEST - {"missing"} for path in folder.iterdir()}
    found += complaints(
        files, lambda: from_yaml("dataset/fashion_mnist", root=str(folder)), root=folder
    )
    cifar = tmp_path / "cifar-100-python"
    cifar.mkdir()
    for split in ("train", "test"):
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        table = {b"data": pixels, b"fine_labels": list(range(20))}
        (cifar / split).write_bytes(pickle.dumps(table))
    found += complaints(
        {cifar / "train": NO_DIGEST}, lambda: from_yaml("dataset/cifar100", root=str(cifar)),
        root=cifar,
    )  # fmt: skip
    images = tmp_path / "images"
    for split in ("train", "val"):
        for label in ("a", "b"):
            (images / split / label).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / split / label / f"{number}.jpg")

    def all_images() -> None:
        data = {"num_classes": 2, "image_size": 32, "root": str(images)}
        task = from_yaml("dataset/imagenet1k", **data)
        assert len(task.train) == 4
        for index in range(4):
            _ = task.validation[index]

    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "val"):
        shard(images / split, shards / f"{split}-0.tar")
    found += complaints(
        {shards / "train-0.tar": NO_DIGEST},
        lambda: from_yaml("dataset/imagenet1k", root=str(shards), num_classes=2),
        root=shards,
    )
    found += complaints(
        {images / "val" / "a" / "0.jpg": (NO_DIGEST - NO_FILE) | {"a pipe"}}, all_images
    )
    assert not found, "\n".join(found)


def test_weights(tmp_path: Path) -> None:
    shape = {"image_size": 8, "channels": 1, "num_classes": 10}
    small = {"patch_size": 4, "dim": 16, "depth": 1, "heads": 2}
    state = build(leaf("model/vit", **small), "model", shape).state_dict()
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    found = []
    for name, damages in (("a.pt", NO_DIGEST), ("a.safetensors", NO_DIGEST)):
        file = tmp_path / name
        node = leaf("model/vit", **small, checkpoint=str(file))
        found += complaints({file: damages}, lambda node=node: build(node, "model", shape))  # type: ignore[misc]
    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["n_embd"] == 16
    node = leaf("model/gpt2", dim=16, depth=1, heads=2, checkpoint=str(folder))
    found += complaints(
        {
            folder / "model.safetensors": NO_DIGEST,
            folder / "config.json": NO_DIGEST - NO_FILE,
        },
        lambda: build(node, "model", {"vocab_size": 300, "context_length": 16}),
        root=folder,
    )
    assert not found, "\n".join(found)
