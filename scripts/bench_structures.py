"""What every configuration that results/kernels times learns, on small models and real data.

    python scripts/bench_structures.py [--seeds 3] [--steps 1000]

Trains the ViT demo on Fashion-MNIST (where it is installed, else the digits) and the GPT-2 demo on
the embedded text, at 90% sparsity, once for each structure and seed, all else as the demos have it.
Writes results/tables/structure_accuracy.csv after every run, seed by seed, so that a run that is
cut short leaves whole seeds.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from runs import FASHION, compose, training

from padst_exp.config import build
from padst_exp.engine.run_directory import environment
from padst_exp.errors import UserError

STRUCTURES = {
    "dense": ["structure=dense", "permutation=none", "dst=static"],
    "unstructured": ["structure=unstructured", "permutation=none"],
    "nm group=1": ["structure=nm", "structure.group=1"],
    "nm group=16": ["structure=nm", "structure.group=16"],
    "nm group=32": ["structure=nm", "structure.group=32"],
    "nm group=64": ["structure=nm", "structure.group=64"],
    "block size=16": ["structure=block", "structure.size=16"],
    "block size=32": ["structure=block", "structure.size=32"],
    "block size=64": ["structure=block", "structure.size=64"],
    "diag bundle=1": ["structure=diag", "structure.bundle=1"],
    "diag stride=16": ["structure=diag", "structure.bundle=stride", "structure.stride=16"],
    "diag stride=32": ["structure=diag", "structure.bundle=stride", "structure.stride=32"],
}
TABLE = Path(__file__).parents[1] / "results" / "tables" / "structure_accuracy.csv"


def main() -> None:
    """Train everything, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sparsity", type=float, default=0.9)
    arguments = parser.parse_args()
    datasets = {images(): FASHION if images() == "fashion_mnist" else []}
    datasets["shakespeare"] = ["model=gpt2"]
    env = environment("cpu")
    rows: list[dict[str, object]] = []
    for seed in range(arguments.seeds):
        for dataset, overrides in datasets.items():
            for name, choice in STRUCTURES.items():
                cfg = compose(
                    *overrides, *choice, f"sparsity={arguments.sparsity}", f"seed={seed}",
                    f"trainer.steps={arguments.steps}", "trainer.eval_interval=null",
                )  # fmt: skip
                try:
                    with training(cfg) as (_, summary):
                        pass
                except UserError as error:
                    print(f"{dataset} {name}: left out, {error}")
                    continue
                rows.append(
                    {
                        "dataset": dataset,
                        "model": "gpt2" if dataset == "shakespeare" else "vit",
                        "structure": name,
                        "density": round(summary["density_of_layers"], 4),
                        "permutation": cfg.permutation._target_.rpartition(".")[2],
                        "dst": cfg.dst._target_.rpartition(".")[2],
                        "seed": seed,
                        "metric": summary["monitor"],
                        "value": summary["final"][summary["monitor"]],
                        "steps": arguments.steps,
                        "commit": env["git_commit"],
                        "dirty": env["git_dirty"],
                    }
                )
                print(*rows[-1].values(), flush=True)
                write(rows)


def images() -> str:
    """The harder of the image sets that are here."""
    try:
        build(compose(*FASHION).dataset, "dataset")
    except UserError:
        return "digits"
    return "fashion_mnist"


def write(rows: list[dict[str, object]]) -> None:
    """Write what is measured so far."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
