"""Throughput of our loaders beside bare ones, and of decoders of JPEG beside Pillow's.

    python scripts/bench_input.py [--rounds 5] [--images 96]

All sides of a row take turns in one process. A ratio is that of samples per second, `cpu_ratio`
that of samples per second of CPU time, which says more on a machine that does other work as well;
above 1 is faster than the bare side. Writes results/tables/input.csv.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import resource
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from runs import Row, compose, write
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from padst_exp.config import build
from padst_exp.data.corpora import END_OF_TEXT
from padst_exp.data.sampler import train_loader
from padst_exp.data.task import Task

Batches = Iterable[Any]
BATCH, LENGTH, WORKERS = 16, 256, (0, 2)


def main() -> int:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=96)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PADST_CACHE"] = f"{folder}/cache"
        pictures = [picture(number) for number in range(arguments.images)]
        rows = [*decoders(pictures, arguments.rounds)]
        rows += images(Path(folder), pictures, arguments.rounds)
        rows += texts(Path(folder), arguments.rounds)
    write("input", rows)
    for row in rows:
        print(f"{row['what']:<66} {row['ratio']:>7} {row['cpu_ratio']:>7}  {row['detail']}")
    return 0


def picture(number: int) -> bytes:
    """A JPEG of the size of most of ImageNet's."""
    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
    noisy = (pixels + draw.integers(-12, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(noisy).save(content, "jpeg", quality=90)
    return content.getvalue()


def measured(batches: Batches) -> tuple[float, float]:
    """Samples a second after the first batch, and a second of CPU time, workers included."""
    before = cpu_seconds()
    count, began = 0, 0.0
    for batch in batches:
        if count == 0:
            began, first = time.perf_counter(), len(batch[0])
        count += len(batch[0])
    wall = time.perf_counter() - began
    return (count - first) / wall, count / (cpu_seconds() - before)


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + workers.ru_utime + workers.ru_stime


def compared(
    what: str, sides: dict[str, Callable[[], Batches]], rounds: int, bare: str
) -> Iterator[Row]:
    """A row for each side but the bare one; all take turns, after one turn that does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            speed = measured(side())
            if number:
                found[name].append(speed)
    for name in sides:
        if name == bare:
            continue
        pairs = list(zip(found[name], found[bare], strict=True))
        ratios = [ours[0] / theirs[0] for ours, theirs in pairs]
        yield {
            "what": f"{what}: {name} / {bare}",
            "ratio": round(statistics.median(ratios), 3),
            "cpu_ratio": round(statistics.median(o[1] / t[1] for o, t in pairs), 3),
            "detail": f"{min(ratios):.3g} to {max(ratios):.3g} in {rounds} rounds",
        }


def decoders(pictures: list[bytes], rounds: int) -> Iterator[Row]:
    """From bytes to an image of Pillow, which the transforms take."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def image(pixels: Tensor) -> Image.Image:
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def pillow(content: bytes) -> Image.Image:
        return Image.open(io.BytesIO(content)).convert("RGB")

    def torchvision(content: bytes) -> Image.Image:
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return image(decode_jpeg(encoded, mode=ImageReadMode.RGB))

    ways = {"Pillow": pillow, "torchvision": torchvision}
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # it points to torchcodec
    if importlib.util.find_spec("torchcodec") is not None:
        from torchcodec.decoders import decode_jpeg as decode

        ways["torchcodec"] = lambda content: image(decode(content, mode="RGB"))
    for way in ways.values():
        for content in pictures[:4]:
            assert np.array_equal(np.asarray(way(content)), np.asarray(pillow(content)))
    sides = {
        name: lambda way=way: ([[way(content)]] for content in pictures)  # type: ignore[misc]
        for name, way in ways.items()
    }
    yield from compared("decoding of a JPEG, same pixels", sides, rounds, "Pillow")


def images(folder: Path, pictures: list[bytes], rounds: int) -> Iterator[Row]:
    """Folders, parquet and shards through our loader, beside torchvision's and WebDataset's."""
    roots = image_files(folder, pictures)
    tasks = {name: image_task(root) for name, root in roots.items()}
    transform = tasks["folders"].train.transform
    for workers in WORKERS:
        sides: dict[str, Callable[[], Batches]] = {
            f"our loader on {name}": lambda task=task, workers=workers: loader(task, workers)  # type: ignore[misc]
            for name, task in tasks.items()
        }
        sides["ImageFolder in a DataLoader"] = lambda workers=workers: DataLoader(  # type: ignore[misc]
            ImageFolder(str(roots["folders"] / "train"), transform), BATCH, shuffle=True,
            num_workers=workers, drop_last=True,
        )  # fmt: skip
        what = f"images, {workers} workers"
        yield from compared(what, sides, rounds, "ImageFolder in a DataLoader")
        if importlib.util.find_spec("webdataset") is not None:
            shards = sorted(map(str, (roots["shards"]).glob("train-*.tar")))
            sides = {
                "our loader on shards": sides["our loader on shards"],
                "WebDataset in a DataLoader": lambda shards=shards, workers=workers: webdataset(  # type: ignore[misc]
                    shards, transform, workers
                ),
            }
            yield from compared(what, sides, rounds, "WebDataset in a DataLoader")


def loader(task: Task, workers: int, steps: int | None = None) -> Batches:
    """Our loader: one pass, or so many batches."""
    total = (task.samples or 0) // BATCH if steps is None else steps
    return train_loader(
        task, batch_size=BATCH, micro_batches=1, start_step=0, total_steps=total, seed=0, rank=0,
        world_size=1, workers=workers,
    )  # fmt: skip


def webdataset(shards: list[str], transform: Callable[[Any], Tensor], workers: int) -> Batches:
    """The library's pipeline as its pages show it."""
    import webdataset as wds

    rows = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pil")
    rows = rows.to_tuple("jpg", "cls").map_tuple(transform, torch.tensor).batched(BATCH)
    return DataLoader(rows, batch_size=None, num_workers=workers)


def image_task(root: Path) -> Task:
    """ImageNet's recipe on two classes."""
    cfg = compose(
        "model=vit", "dataset=imagenet1k", f"dataset.root={root}", "dataset.num_classes=2"
    )
    made: Task = build(cfg.dataset, "dataset")
    return made


def image_files(folder: Path, pictures: list[bytes]) -> dict[str, Path]:
    """The same images in each layout, in two shards."""
    import datasets

    roots = {name: folder / name for name in ("folders", "parquet", "shards")}
    for split in ("train", "val"):
        labels = [number % 2 for number in range(len(pictures))]
        for number, (content, label) in enumerate(zip(pictures, labels, strict=True)):
            path = roots["folders"] / split / str(label) / f"{number:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        rows = datasets.Dataset.from_dict(
            {"image": [{"bytes": content, "path": None} for content in pictures], "label": labels}
        )
        rows.to_parquet(roots["parquet"] / f"{split}.parquet")
        roots["shards"].mkdir(exist_ok=True)
        for shard in range(2):
            with tarfile.open(roots["shards"] / f"{split}-{shard}.tar", "w") as tar:
                for number in range(shard, len(pictures), 2):
                    key, label = f"{number:05}", str(labels[number]).encode()
                    for suffix, content in (("jpg", pictures[number]), ("cls", label)):
                        info = tarfile.TarInfo(f"{key}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    return roots


def texts(folder: Path, rounds: int) -> Iterator[Row]:
    """Tokens in a file, and text that is tokenised on the way."""
    root, words = folder / "text", [f"word{number}" for number in range(400)]
    root.mkdir()
    draw = np.random.default_rng(0)
    files = [root / f"train-{number}.jsonl" for number in range(4)]
    for path in (*files, root / "validation.jsonl"):
        lines = [json.dumps({"text": " ".join(draw.choice(words, 300))}) for _ in range(500)]
        path.write_text("\n".join(lines) + "\n")
    tokenizer = small_tokenizer(words)
    tokenizer.save(str(folder / "tokenizer.json"))
    common = ["model=gpt2", "dataset=c4", f"dataset.root={root}", "dataset.streams=4",
              f"dataset.context_length={LENGTH}",
              f"dataset.vocab={folder}/tokenizer.json"]  # fmt: skip
    whole = build(compose(*common).dataset, "dataset")
    stream = build(compose(*common, "dataset.streaming=true").dataset, "dataset")
    steps = whole.samples // BATCH
    sides: dict[str, Callable[[], Batches]] = {
        "our loader": lambda: loader(whole, 0),
        "windows of a memmap in a DataLoader": lambda: DataLoader(
            Windows(whole.train.stream.tokens), BATCH, shuffle=True, drop_last=True
        ),
    }
    yield from compared("tokens of a file", sides, rounds, "windows of a memmap in a DataLoader")
    sides = {
        "our stream": lambda: loader(stream, 0, steps),
        "datasets streaming, packed": lambda: packed(list(map(str, files)), tokenizer, steps),
    }
    yield from compared("text on the way", sides, rounds, "datasets streaming, packed")


def small_tokenizer(words: list[str]) -> Tokenizer:
    """A byte-level BPE with GPT-2's end of text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT], show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([" ".join(words)], trainer)
    return made


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Blocks of a memory map, one at a time."""

    def __init__(self, tokens: np.ndarray[Any, Any]) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * LENGTH
        block = torch.from_numpy(self.tokens[start : start + LENGTH + 1].astype(np.int64))
        return block[:-1], block[1:]


def packed(files: list[str], tokenizer: Tokenizer, steps: int) -> Batches:
    """One generator, as a training script has it."""
    import datasets

    rows = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    end, tokens = tokenizer.token_to_id(END_OF_TEXT), np.empty(0, np.int64)
    for batch in rows.iter(256):
        found = [encoding.ids for encoding in tokenizer.encode_batch_fast(batch["text"])]
        more = np.array([token for ids in found for token in (*ids, end)], np.int64)
        tokens = np.concatenate([tokens, more])
        size = BATCH * LENGTH
        while len(tokens) > size and steps:
            block = torch.from_numpy(tokens[: size + 1])
            yield block[:-1].view(BATCH, LENGTH), block[1:].view(BATCH, LENGTH)
            tokens, steps = tokens[size:], steps - 1


if __name__ == "__main__":
    sys.exit(main())
