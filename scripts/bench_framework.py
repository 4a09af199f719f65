"""What the framework itself costs: step time, rewiring, memory. Ratios, measured in one run.

    python scripts/bench_framework.py [--rounds 5] [--steps 200]

Prints each ratio beside its limit, writes results/tables/framework.csv, and exits with 1 when a
limit is broken.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig
from padst_exp.engine.topology import move_state
from runs import compose, training
from torch import nn

from padst_exp.config import build
from padst_exp.data.sampler import train_loader
from padst_exp.data.task import Batch
from padst_exp.dst import DropGrow, Magnitude, Uniform
from padst_exp.engine.run_directory import environment, read_metrics
from padst_exp.engine.step import Stepper
from padst_exp.layers import permutations, sparse_weights
from padst_exp.permutations import DoublyStochastic
from padst_exp.sparsify import Rule, sparsify
from padst_exp.structures import NM, Block, Diagonal, Structure, Unstructured
from padst_exp.train import sparse_model

STEP_LIMIT, REWIRE_LIMIT, MEMORY_LIMIT = 1.05, 0.02, 0.2

SET = DropGrow(
    drop=Magnitude(), grow=Uniform(), fraction=0.3, interval=10, stop=0.75, moments="age"
)
STRUCTURES: dict[str, Structure] = {
    "unstructured": Unstructured(),
    "block size=16": Block(size=16, balanced=False),
    "nm group=1": NM(n=1, m=None, group=1),
    "nm group=16": NM(n=1, m=None, group=16),
    "diag bundle=1": Diagonal(bundle=1, stride=16, width=16),
}


def main() -> int:
    """Measure everything; 1 when a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    rows = memory_rows()
    rows.append(step_row(arguments.rounds, arguments.steps))
    rows.append(rewire_row(arguments.rounds, arguments.steps))
    write(rows)
    broken = [row for row in rows if row["limit"] and float(row["ratio"]) > float(row["limit"])]
    for row in rows:
        limit = f"limit {row['limit']}" if row["limit"] else "no limit"
        print(f"{row['what']:<58} {row['ratio']:>7}  {limit:<12} {row['detail']}")
    return int(bool(broken))


def framework_step_seconds(cfg: DictConfig) -> float:
    """Mean seconds of one step of a whole run, logging included, set-up and evaluation not."""
    with training(cfg) as (path, _):
        rows = [r for r in read_metrics(path / "metrics.jsonl") if r["kind"] == "train"]
    # The first row pays for first allocations, on either side.
    return sum(row["seconds"] for row in rows[1:]) / (rows[-1]["step"] - rows[0]["step"])


def bare_step_seconds(cfg: DictConfig) -> float:
    """The same for a loop as one writes it by hand, on the same model and data."""
    task = build(cfg.dataset, "dataset")
    model, _ = sparse_model(cfg, task, build(cfg.permutation, "permutation"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    # Batches are ready before the clock starts, so only the framework pays for loading.
    batches = list(
        train_loader(
            task, batch_size=cfg.trainer.batch_size, micro_batches=1, start_step=0,
            total_steps=cfg.trainer.steps, seed=0, rank=0, world_size=1, workers=0,
        )
    )  # fmt: skip
    warm_up = cfg.trainer.log_interval
    for step, (inputs, targets) in enumerate(batches):
        if step == warm_up:
            start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        task.loss(model(inputs), targets).backward()
        optimizer.step()
    return (time.perf_counter() - start) / (len(batches) - warm_up)


def step_row(rounds: int, steps: int) -> dict[str, str]:
    """Step time of the framework over that of a bare loop, alternating."""
    cfg = compose("permutation=none", "dst=static", f"trainer.steps={steps}",
                  "trainer.eval_interval=null")  # fmt: skip
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(bare_step_seconds(cfg))
        ours.append(framework_step_seconds(cfg))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return row(
        "step time, framework / bare loop (demo ViT, nm)",
        statistics.median(ratios),
        STEP_LIMIT,
        f"{min(ratios):.3f} to {max(ratios):.3f} in {rounds} rounds, bare step "
        f"{1e3 * statistics.median(theirs):.1f} ms",
    )


def rewire_row(rounds: int, steps: int) -> dict[str, str]:
    """Share of training time that RigL's updates take at interval 100.

    What a step with an update takes beyond the steps around it, which collect no dense gradient
    and move nothing.
    """
    every = 5
    cfg = compose("permutation=none", "dst=rigl", f"dst.interval={every}", "dst.stop=1.0",
                  f"trainer.steps={steps}", "trainer.eval_interval=null")  # fmt: skip
    shares = []
    for _ in range(rounds):
        seconds: list[float] = []
        original = Stepper.step

        def timed(self: Stepper, batches: Iterator[Batch], into: list[float] = seconds) -> None:
            start = time.perf_counter()
            original(self, batches)  # noqa: B023 (the same in every round)
            into.append(time.perf_counter() - start)

        with unittest.mock.patch.object(Stepper, "step", timed):
            framework_step_seconds(cfg)
        due = [s for step, s in enumerate(seconds, 1) if step % every == 0 and step < steps]
        others = [s for step, s in enumerate(seconds, 1) if step % every and step > every]
        plain = statistics.median(others)
        shares.append((statistics.median(due) - plain) / (100 * plain))
    return row(
        "share of RigL updates at interval 100 (demo ViT, nm)",
        statistics.median(shares),
        REWIRE_LIMIT,
        f"{min(shares):.4f} to {max(shares):.4f} in {rounds} rounds of {steps // every} updates",
    )


def memory_rows() -> list[dict[str, str]]:
    """Bytes of parameters, gradients, AdamW moments and indices at 90%, over dense."""
    rows = []
    for name, structure in STRUCTURES.items():
        layer = nn.Sequential(nn.Linear(768, 3072, bias=False))
        sparsify(layer, [Rule("0")], structure=structure, density=0.1,
                 learner=DoublyStochastic(side="auto"))  # fmt: skip
        dense = 4 * 4 * 768 * 3072
        optimizer, _ = build(compose().optimizer, "optimizer").create(layer, total_steps=100)
        soft = trained_bytes(layer, optimizer) / dense
        for permutation in permutations(layer).values():
            permutation.harden()
        rows.append(
            row(
                f"memory of a 768->3072 layer at 90%, {name} / dense",
                trained_bytes(layer, optimizer) / dense,
                MEMORY_LIMIT,
                f"soft phase {soft:.3f}",
            )
        )
    return rows


def trained_bytes(layer: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What one layer holds after a step and a rewiring: all parameters, gradients, state, indices.

    Soft matrices have an optimizer of their own, Adam too: twice their size in moments.
    """
    layer(torch.zeros(1, 768)).sum().backward()
    optimizer.step()
    for weight in sparse_weights(layer).values():
        relayout = weight.rewire(SET, step=10, total=100, generator=torch.Generator())
        move_state(weight, relayout, optimizer, SET.moments, 10)
        weight.relayout_(relayout)
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim > 0]
    soft = [p.logits for p in permutations(layer).values() if p.logits is not None]
    tensors = [
        *layer.parameters(), *(p.grad for p in layer.parameters() if p.grad is not None),
        *states, *layer.buffers(),
    ]  # fmt: skip
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + 2 * sum(t.untyped_storage().nbytes() for t in soft)


def row(what: str, ratio: float, limit: float, detail: str) -> dict[str, str]:
    """One line of the table."""
    return {"what": what, "ratio": f"{ratio:.4f}", "limit": f"{limit}", "detail": detail}


def write(rows: list[dict[str, str]]) -> None:
    """Write the table with where it was measured."""
    env = environment("cpu")
    packages = env["packages"]
    assert isinstance(packages, dict)
    where = {
        "commit": env["git_commit"], "dirty": env["git_dirty"], "device": env["device"],
        "threads": torch.get_num_threads(), "torch": packages["torch"],
    }  # fmt: skip
    path = Path(__file__).parents[1] / "results" / "tables" / "framework.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows({**entry, **where} for entry in rows)


if __name__ == "__main__":
    sys.exit(main())
