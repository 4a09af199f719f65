"""What the demos reach, whether their sparse layers earn it, and what every structure learns.

    python scripts/bench_accuracy.py [demos] [structures] [--seeds 3] [--steps 1000]

demos: top-1 of the ViT demo on the digits and, where it is installed, Fashion-MNIST; the same with
every sparse layer zero throughout; and a linear classifier on the pixels. On the embedded text,
perplexity of the GPT-2 demo and of smoothed bigrams. Exits with 1 when a demo misses a limit.

structures: the ViT demo on the harder of these image sets and the GPT-2 demo, at 90% sparsity, once
for each structure of conf/bench.yaml and seed, seed by seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from runs import FASHION, STRUCTURES, Row, compose, overrides_of, training, write
from sklearn.linear_model import LogisticRegression
from torch import nn

from padst_exp.bench import choices
from padst_exp.config import build
from padst_exp.data.task import Task
from padst_exp.errors import UserError
from padst_exp.layers import sparse_weights

IMAGES: dict[str, list[str]] = {"digits": [], "fashion_mnist": FASHION}
NM, STATIC = {"structure": "nm", "group": 16}, ["permutation=none", "dst=static"]


def main() -> int:
    """Train, compare, write; 1 when a demo misses a limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", default=["demos", "structures"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    seeds, steps = range(arguments.seeds), f"trainer.steps={arguments.steps}"
    tasks: dict[str, Task] = {}
    for name, overrides in IMAGES.items():
        try:
            tasks[name] = build(compose(*overrides).dataset, "dataset")
        except UserError as error:
            print(f"{name}: skipped, {error}")
    if "structures" in arguments.tables:
        structures(list(tasks)[-1], seeds, steps)
    missed = demos(tasks, seeds, steps) if "demos" in arguments.tables else []
    print("\n".join(missed) or "every limit is met")
    return int(bool(missed))


def train(
    dataset: str, model: str, seed: int, entry: Row, overrides: list[str],
    prepare: Callable[[nn.Module], object] = lambda model: None,
) -> tuple[Row, Row]:  # fmt: skip
    """A line of a table, and the summary of the run."""
    cfg = compose(*overrides_of(entry), *overrides, f"seed={seed}")
    groups = {group: cfg[group]._target_.rpartition(".")[2] for group in ("permutation", "dst")}
    with training(cfg, prepare) as (_, summary):
        metric = summary["monitor"]
    row = {"dataset": dataset, "seed": seed, "model": model, "metric": metric,
           "value": summary["final"][metric], "structure": choices.sparsities(entry)[0].label,
           "density": round(summary["density_of_layers"], 4), **groups,
           "steps": cfg.trainer.steps}  # fmt: skip
    print(*row.values(), flush=True)
    return row, summary


def demos(tasks: dict[str, Task], seeds: range, steps: str) -> list[str]:
    """Train all demos and their baselines; the limits that are missed."""
    rows: list[Row] = []
    limits: dict[str, bool] = {}
    for name, task in tasks.items():
        overrides = [*IMAGES[name], steps]
        for seed in seeds:
            demo, summary = train(name, "demo", seed, NM, overrides)
            zeroed, _ = train(name, "zeroed", seed, NM, [*overrides, *STATIC], zero)
            # Of another structure than what is looked up: that of no weight at all.
            rows += [demo, {**zeroed, "structure": "", "density": ""}]
            limits[f"{name} seed {seed}: permutations harden badly"] = hardened(name, summary)
            limits[f"{name} seed {seed}: zeros cost little"] = zeroed["value"] <= demo["value"] - 10
            enough = name != "digits" or demo["value"] > 95
            limits[f"digits seed {seed}: not above 95%"] = enough
        baseline = {"model": "linear", "metric": "top1", "value": linear(task)}
        rows.append({"dataset": name, "seed": "", **baseline})
    block = {"structure": "block", "size": 16}
    for seed in seeds:
        text = ["model=gpt2", "sparsity=0.8"]
        demo, summary = train("shakespeare", "demo", seed, block, text)
        bigram = summary["baselines"]["bigram_perplexity"]
        rows.append(demo)
        limits[f"gpt2 seed {seed}: permutations harden badly"] = hardened("gpt2", summary)
        limits[f"gpt2 seed {seed}: perplexity not below bigrams"] = demo["value"] < bigram
    baseline = {"model": "bigram", "metric": "perplexity", "value": bigram}
    rows.append({"dataset": "shakespeare", "seed": "", **baseline})
    write("demo_accuracy", rows)
    return [what for what, met in limits.items() if not met]


def hardened(name: str, summary: Row) -> bool:
    """Whether 80% of the permutations harden by delta with a loss jump under 5% each."""
    events = summary["permutations"]["events"]
    total = len(events) + len(summary["permutations"]["still_soft"])
    jumps = [event["loss_after"] / event["loss_before"] - 1 for event in events]
    pairs = zip(events, jumps, strict=True)
    good = sum(event["reason"] == "delta" and jump < 0.05 for event, jump in pairs)
    print(f"{name}: {good} of {total} permutations hardened well, largest jump {max(jumps):.2%}")
    return good >= 0.8 * total


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


def structures(images: str, seeds: range, steps: str) -> None:
    """Train every structure that is legal there, seed by seed; write after every run."""
    rows: list[Row] = []
    datasets = {images: ("vit", IMAGES[images]), "shakespeare": ("gpt2", ["model=gpt2"])}
    for seed in seeds:
        for dataset, (model, overrides) in datasets.items():
            for entry in [{"structure": "dense"}, *STRUCTURES]:
                still = STATIC if entry["structure"] == "dense" else []
                try:
                    rows.append(train(dataset, model, seed, entry, [*overrides, *still, steps])[0])
                    write("structure_accuracy", rows)
                except UserError as error:
                    print(f"{dataset} {entry}: left out, {error}")


if __name__ == "__main__":
    sys.exit(main())
