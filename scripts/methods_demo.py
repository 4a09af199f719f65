"""Every method on every structure that it serves, small: results/tables/methods_demo.csv.

    python scripts/methods_demo.py [--seeds 3] [--steps 500] [--jobs 2] [--only dst=rigl ...]

Images (Fashion-MNIST where it is installed, else the digits) by the ViT demo, top-1; the embedded
text by the GPT-2 demo, perplexity. Both have two blocks, no permutations, 90 and 80% sparsity; the
dense model beside. A random topology that stays is `static`. One thread a run, `jobs` at a time. A
row is added as a run ends, and what has its row is not run again, so the command can be stopped and
repeated. A pair that makes no sense is refused by the command itself, and has the reason in place
of a value.

Nothing is tuned for a method. Text takes twice the steps with half the batch, for few large batches
teach no more than bigrams, at one rate for all: dense models learn best at half of it, RigL at
twice. Topologies are updated 20 times in a run's length.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from runs import FASHION, compose, measured_where, training
from tqdm import tqdm

from padst_exp.config import build, options
from padst_exp.errors import UserError

TABLE = Path(__file__).parents[1] / "results" / "tables" / "methods_demo.csv"
KEY = ("dataset", "sparsity", "structure", "dst", "seed", "steps")
TEXT = "shakespeare"
DEMOS = {
    "fashion_mnist": FASHION,
    "digits": [],
    TEXT: ["model=gpt2", "trainer.batch_size=8", "optimizer.lr=0.006"],
}
UPDATES = 20
Row = dict[str, Any]


def main() -> None:
    """Run what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    only = dict(pair.split("=", 1) for pair in arguments.only)
    known = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=KEY)
    done = set(known[[*KEY]].itertuples(index=False, name=None))
    left = [
        row
        for row in grid(images(), arguments.seeds, arguments.steps)
        if tuple(row[key] for key in KEY) not in done
        and all(str(row[key]) == value for key, value in only.items())
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.jobs, torch.set_num_threads, (1,)) as pool:
        for row in tqdm(pool.imap_unordered(run, left), total=len(left)):
            frame = pd.DataFrame([row])
            frame.to_csv(TABLE, mode="a", header=not TABLE.exists(), index=False)
        pool.close()
        pool.join()


def images() -> str:
    """The harder set of images that is here."""
    try:
        build(compose(*FASHION).dataset, "dataset")
    except UserError:
        return "digits"
    return "fashion_mnist"


def grid(dataset_of_images: str, seeds: int, steps: int) -> Iterator[Row]:
    """All rows, one seed after another; the dense model once."""
    structures = [name for name in options("structure") if name != "dense"]
    pairs = [("dense", "static"), *itertools.product(structures, options("dst"))]
    for seed, sparsity, dataset in itertools.product(
        range(seeds), (0.9, 0.8), (dataset_of_images, TEXT)
    ):
        for structure, dst in pairs:
            if structure == "dense" and sparsity != 0.9:
                continue
            shown = 0.0 if structure == "dense" else sparsity
            yield {
                "dataset": dataset, "sparsity": shown, "structure": structure, "dst": dst,
                "seed": seed, "steps": 2 * steps if dataset == TEXT else steps,
            }  # fmt: skip


def run(row: Row) -> Row:
    """Train one; its row with what came of it."""
    groups = [f"{key}={row[key]}" for key in ("structure", "dst", "seed", "sparsity")]
    empty = {"metric": "", "value": "", "density": "", "cpu_seconds": "", "refused": ""}
    began = time.process_time()
    try:
        cfg = compose(
            *DEMOS[row["dataset"]], "model.depth=2", *groups, "permutation=none",
            f"trainer.steps={row['steps']}",
        )  # fmt: skip
        if "interval" in cfg.dst:
            cfg.dst.interval = min(cfg.dst.interval, row["steps"] // UPDATES)
        with training(cfg) as (_, summary):
            metric = summary["monitor"]
        found = {
            "metric": metric,
            "value": round(summary["final"][metric], 4),
            "density": round(summary["density_of_layers"], 4),
            "cpu_seconds": round(time.process_time() - began),
        }
    except UserError as error:
        found = {"refused": str(error)}
    return {**row, **empty, **found, **measured_where()}


if __name__ == "__main__":
    main()
