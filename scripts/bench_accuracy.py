"""Do the sparse layers earn it? The demo against itself with those layers zeroed.

    python scripts/bench_accuracy.py [--seeds 3] [--steps 1000]

On the digits and, where it is installed, Fashion-MNIST: top-1 of the demo, of the same run with
every sparse layer zero throughout, and of a linear classifier on the pixels. Prints them and
writes results/tables/demo_accuracy.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from sklearn.linear_model import LogisticRegression

from padst_exp.config import build, config_dir, register_schemas, results_config
from padst_exp.data.task import Task
from padst_exp.engine import loop
from padst_exp.engine.distributed import World
from padst_exp.engine.run_directory import RunDirectory, environment
from padst_exp.errors import UserError
from padst_exp.layers import sparse_weights
from padst_exp.train import sparse_model

FASHION = """
    dataset=fashion_mnist dataset.shift=0 dataset.flip=false model.patch_size=7 model.dim=128
    model.depth=4 model.heads=4 trainer.epochs=null trainer.batch_size=64 optimizer.lr=0.002
"""
DATASETS: dict[str, list[str]] = {"digits": [], "fashion_mnist": FASHION.split()}


def main() -> int:
    """Train, compare, write; 1 when zeroing costs nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    register_schemas()
    rows: list[dict[str, object]] = []
    for dataset, overrides in DATASETS.items():
        try:
            task = build(compose(*overrides, "trainer.steps=1").dataset, "dataset")
        except UserError as error:
            print(f"{dataset}: skipped, {error}")
            continue
        for seed in range(arguments.seeds):
            common = [*overrides, f"trainer.steps={arguments.steps}", f"seed={seed}",
                      "trainer.eval_interval=null"]  # fmt: skip
            demo = top1(compose(*common))
            zeroed = top1(compose(*common, "permutation=none", "dst=static"), zeroed=True)
            rows.append({"dataset": dataset, "seed": seed, "model": "demo", "top1": demo})
            rows.append({"dataset": dataset, "seed": seed, "model": "zeroed", "top1": zeroed})
        rows.append({"dataset": dataset, "seed": "", "model": "linear", "top1": linear(task)})
    means = {}
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        for model in ("demo", "zeroed", "linear"):
            found = [
                float(str(row["top1"]))
                for row in rows
                if row["dataset"] == dataset and row["model"] == model
            ]
            means[dataset, model] = statistics.mean(found)
            print(f"{dataset:<14} {model:<7} {means[dataset, model]:6.2f}  {found}")
    write(rows, arguments.steps)
    return int(any(means[d, "demo"] < means[d, "zeroed"] + 1 for d, m in means if m == "demo"))


def compose(*overrides: str) -> DictConfig:
    """The configuration of a training."""
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose("config", ["logger=none", *overrides])


def top1(cfg: DictConfig, *, zeroed: bool = False) -> float:
    """Final top-1 in percent of a whole run."""
    task = build(cfg.dataset, "dataset")
    learner = build(cfg.permutation, "permutation")
    model, report = sparse_model(cfg, task, learner)
    if zeroed:
        for weight in sparse_weights(model).values():
            torch.nn.init.zeros_(weight.values)
            weight.values.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.create(
            Path(folder), "bench", resume="never", config=results_config(cfg), config_text="",
            overrides=[], device="cpu",
        )  # fmt: skip
        summary = loop.run(
            model=model, task=task, algorithm=build(cfg.dst, "dst"), learner=learner,
            optimizer=build(cfg.optimizer, "optimizer"), trainer=build(cfg.trainer, "trainer"),
            report=report, directory=directory, logger=build(cfg.logger, "logger"),
            world=World(), seed=cfg.seed,
        )  # fmt: skip
    return float(summary["final"]["top1"])


def linear(task: Task) -> float:
    """Top-1 in percent of a logistic regression on the pixels."""
    indices = range(min(len(task.train), 10_000))
    images, labels = task.train.__getitems__([(0, index) for index in indices])
    tests, truth = task.validation.__getitems__(list(range(len(task.validation))))
    classifier = LogisticRegression(max_iter=300)
    classifier.fit(images.flatten(1).numpy(), labels.numpy())
    return 100 * float(classifier.score(tests.flatten(1).numpy(), truth.numpy()))


def write(rows: list[dict[str, object]], steps: int) -> None:
    """Write the table with where it was measured."""
    env = environment("cpu")
    where = {"steps": steps, "commit": env["git_commit"], "dirty": env["git_dirty"],
             "device": env["device"]}  # fmt: skip
    path = Path(__file__).parents[1] / "results" / "tables" / "demo_accuracy.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
