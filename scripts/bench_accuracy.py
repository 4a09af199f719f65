"""What the demos reach, whether their sparse layers earn it, and what every structure learns.

    python scripts/bench_accuracy.py [demos] [structures] [--seeds 3] [--steps 1000]

demos: top-1 of the ViT demo on the digits and, where it is installed, Fashion-MNIST; of the same run
with every sparse layer zero throughout; and of a linear classifier on the pixels. On the embedded
text, perplexity of the GPT-2 demo and of smoothed bigrams. Exits with 1 when a demo misses a limit.

structures: the ViT demo on the harder of these image sets and the GPT-2 demo, at 90% sparsity, once
for each structure of conf/bench.yaml and seed, seed by seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig
from runs import FASHION, STRUCTURES, compose, training, write
from sklearn.linear_model import LogisticRegression
from torch import nn

from padst_exp.bench import choices
from padst_exp.config import build
from padst_exp.data.task import Task
from padst_exp.errors import UserError
from padst_exp.layers import sparse_weights

IMAGES: dict[str, list[str]] = {"digits": [], "fashion_mnist": FASHION}
DEMO = {"structure": "nm", "group": 16}
DEMO_OF_TEXT = {"structure": "block", "size": 16}
Row = dict[str, Any]


def main() -> int:
    """Train, compare, write; 1 when a demo misses a limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", choices=[[], "demos", "structures"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    seeds, steps, missed = range(arguments.seeds), f"trainer.steps={arguments.steps}", []
    tasks = {}
    for name, overrides in IMAGES.items():
        try:
            tasks[name] = build(compose(*overrides).dataset, "dataset")
        except UserError as error:
            print(f"{name}: skipped, {error}")
    if "structures" not in arguments.tables or "demos" in arguments.tables:
        rows: list[Row] = []
        for name, task in tasks.items():
            rows.append(row(name, "", "linear", "top1", linear(task)))
            for seed in seeds:
                missed += image_demo(rows, name, [*IMAGES[name], steps, f"seed={seed}"], seed)
        for seed in seeds:
            missed += text_demo(rows, ["model=gpt2", "sparsity=0.8", f"seed={seed}"], seed)
        write("demo_accuracy", rows)
        means = defaultdict(list)
        for one in rows:
            means[one["dataset"], one["model"], one["metric"]].append(one["value"])
        for key, values in means.items():
            print(*key, f"{statistics.mean(values):.2f}, {min(values):.2f} to {max(values):.2f}")
        print("\n".join(missed) or "every limit is met")
    if "demos" not in arguments.tables or "structures" in arguments.tables:
        rows = []
        for one in structures({[*tasks][-1]: IMAGES[[*tasks][-1]], "shakespeare": ["model=gpt2"]},
                              seeds, steps):  # fmt: skip
            rows.append(one)
            print(*one.values(), flush=True)
            write("structure_accuracy", rows)
    return int(bool(missed))


def row(
    dataset: str, seed: int | str, model: str, metric: str, value: float,
    entry: Row | None = None, cfg: DictConfig | None = None, density: float | str = "",
) -> Row:  # fmt: skip
    """One line of a table; what is sparse has the label of its structure."""
    label = choices.sparsity(entry).label if entry else ""
    groups = {group: cfg[group]._target_.rpartition(".")[2] if cfg else ""
              for group in ("permutation", "dst")}  # fmt: skip
    return {"dataset": dataset, "model": model, "structure": label, "density": density, **groups,
            "seed": seed, "metric": metric, "value": value}  # fmt: skip


def image_demo(rows: list[Row], name: str, overrides: list[str], seed: int) -> list[str]:
    """Add the demo and the same run with sparse layers of zeros; the limits that it misses."""
    cfg = compose(*overrides)
    with training(cfg) as (_, demo):
        pass
    with training(compose(*overrides, "permutation=none", "dst=static"), zero) as (_, zeroed):
        pass
    reached, without = demo["final"]["top1"], zeroed["final"]["top1"]
    rows.append(row(name, seed, "demo", "top1", reached, DEMO, cfg, round(1 - cfg.sparsity, 4)))
    rows.append(row(name, seed, "zeroed", "top1", without))
    missed = misses(f"{name} seed {seed}", demo)
    if without > reached - 10:
        missed.append(f"{name} seed {seed}: zeroing the sparse layers costs too little")
    if name == "digits" and reached <= 95:
        missed.append(f"digits seed {seed}: top-1 {reached:.2f}, not above 95")
    return missed


def text_demo(rows: list[Row], overrides: list[str], seed: int) -> list[str]:
    """Add the demo, and bigrams with the first one; the limits that it misses."""
    cfg = compose(*overrides, "structure=block")
    with training(cfg) as (_, demo):
        reached, bigram = demo["final"]["perplexity"], demo["baselines"]["bigram_perplexity"]
    density = round(1 - cfg.sparsity, 4)
    rows.append(row("shakespeare", seed, "demo", "perplexity", reached, DEMO_OF_TEXT, cfg, density))
    if seed == 0:
        rows.append(row("shakespeare", "", "bigram", "perplexity", bigram))
    worse = [f"gpt2 seed {seed}: perplexity not below that of bigrams"] if reached >= bigram else []
    return misses(f"gpt2 seed {seed}", demo) + worse


def misses(name: str, summary: Row) -> list[str]:
    """Limits on hardening: 80% of the permutations by delta, with a loss jump under 5% each."""
    events = summary["permutations"]["events"]
    total = len(events) + len(summary["permutations"]["still_soft"])
    jumps = [event["loss_after"] / event["loss_before"] - 1 for event in events]
    good = sum(
        e["reason"] == "delta" and jump < 0.05 for e, jump in zip(events, jumps, strict=True)
    )
    print(
        f"{name}: {good} of {total} hardened by delta with a jump under 5%, largest {max(jumps):.2%}"
    )
    return [] if good >= 0.8 * total else [f"{name}: {good} of {total} hardened well"]


def zero(model: nn.Module) -> None:
    """What the rest of the model learns alone."""
    for weight in sparse_weights(model).values():
        nn.init.zeros_(weight.values)
        weight.values.requires_grad_(False)


def linear(task: Task) -> float:
    """Top-1 in percent of a logistic regression on the pixels."""
    indices = range(min(len(task.train), 10_000))
    images, labels = task.train.__getitems__([(0, index) for index in indices])
    tests, truth = task.validation.__getitems__(list(range(len(task.validation))))
    classifier = LogisticRegression(max_iter=300).fit(images.flatten(1).numpy(), labels.numpy())
    return 100 * float(classifier.score(tests.flatten(1).numpy(), truth.numpy()))


def structures(datasets: dict[str, list[str]], seeds: range, steps: str) -> Iterator[Row]:
    """A run for each seed, data set and structure that is legal there."""
    dense = {"structure": "dense", "permutation": "none", "dst": "static"}
    for seed in seeds:
        for dataset, overrides in datasets.items():
            for entry in [dense, *STRUCTURES]:
                # What is no group of its own is a key of the structure.
                chosen = [f"{k}={v}" if k in ("structure", "permutation", "dst")
                          else f"structure.{k}={v}" for k, v in entry.items()]  # fmt: skip
                cfg = compose(*overrides, *chosen, f"seed={seed}", steps)
                own = {key: value for key, value in entry.items() if key != "dst"}
                try:
                    with training(cfg) as (_, summary):
                        pass
                except UserError as error:
                    print(f"{dataset} {own}: left out, {error}")
                    continue
                metric, model = summary["monitor"], "gpt2" if dataset == "shakespeare" else "vit"
                density = round(summary["density_of_layers"], 4)
                value = summary["final"][metric]
                yield row(dataset, seed, model, metric, value, own, cfg, density)


if __name__ == "__main__":
    sys.exit(main())
