"""What the framework itself costs: step time, rewiring, memory, start. Ratios of one run.

    python scripts/bench_framework.py [--rounds 5] [--steps 200]

Prints each beside its limit, writes results/tables/framework.csv, and exits with 1 when a limit is
broken.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time

import torch
from omegaconf import DictConfig
from runs import STRUCTURES, Row, compose, training, write
from torch import nn

from padst_exp.bench import choices
from padst_exp.bench.models import tensor_bytes
from padst_exp.config import build
from padst_exp.data.sampler import train_loader
from padst_exp.engine.changes import Moments
from padst_exp.engine.distributed import World
from padst_exp.engine.records import read_metrics
from padst_exp.layers import sparse_weights
from padst_exp.soft import soft_choices
from padst_exp.sparsify import Rule, sparsify
from padst_exp.train import build_experiment

LIMITS = {"step": 1.05, "rewire": 0.02, "memory": 0.2, "start": 3.0}


def main() -> int:
    """Measure everything; 1 when a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    rows = [start_row(), *map(memory_row, STRUCTURES)]
    rows += [measure(arguments.rounds, arguments.steps) for measure in (step_row, rewire_row)]
    write("framework", rows)
    for row in rows:
        print(f"{row['what']:<58} {row['ratio']:>7}  limit {row['limit']:<5} {row['detail']}")
    return int(any(row["ratio"] > row["limit"] for row in rows))


def row(what: str, limit: str, values: list[float], detail: str) -> Row:
    """One line of the table: the median of `values`."""
    span = f"{min(values):.4g} to {max(values):.4g}, {detail}" if len(values) > 1 else detail
    ratio = round(statistics.median(values), 4)
    return {"what": what, "ratio": ratio, "limit": LIMITS[limit], "detail": span}


def start_row() -> Row:
    """Seconds of the command line's help."""
    command, seconds = [sys.executable, "-m", "padst_exp.train", "--help"], []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    return row("seconds of padst_exp.train --help", "start", seconds, "5 starts")


def framework_step_seconds(cfg: DictConfig) -> list[float]:
    """Seconds of each step between two rows of metrics, logging included; one value a row."""
    with training(cfg) as (path, _):
        rows = [r for r in read_metrics(path / "metrics.jsonl") if r["kind"] == "train"]
    # The first row pays for first allocations.
    return [row["seconds"] / (row["step"] - last["step"]) for last, row in itertools.pairwise(rows)]


def bare_step_seconds(cfg: DictConfig) -> float:
    """The same for a loop as one writes it by hand, on the same model and data."""
    experiment = build_experiment(cfg, World())
    task, model = experiment.task, experiment.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
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
            began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        task.loss(model(inputs), targets).backward()
        optimizer.step()
    return (time.perf_counter() - began) / (len(batches) - warm_up)


def step_row(rounds: int, steps: int) -> Row:
    """Step time of the framework over that of a bare loop, alternating."""
    cfg = compose("permutation=none", "dst=static", f"trainer.steps={steps}")
    pairs = [
        (bare_step_seconds(cfg), statistics.mean(framework_step_seconds(cfg)))
        for _ in range(rounds)
    ]
    detail = f"bare step {1e3 * statistics.median(bare for bare, _ in pairs):.1f} ms"
    ratios = [framework / bare for bare, framework in pairs]
    return row("step time, framework / bare loop (demo ViT, nm)", "step", ratios, detail)


def rewire_row(rounds: int, steps: int) -> Row:
    """Share of training time that RigL's updates take at interval 100.

    What a step with an update takes beyond the steps around it, which collect no dense gradient
    and move nothing.
    """
    every, shares = 5, []
    cfg = compose("permutation=none", "dst=rigl", f"dst.interval={every}", "dst.stop=1.0",
                  f"trainer.steps={steps}", "trainer.log_interval=1")  # fmt: skip
    for _ in range(rounds):
        seconds = dict(enumerate(framework_step_seconds(cfg), 2))
        due = [s for step, s in seconds.items() if step % every == 0 and step < steps]
        plain = statistics.median(s for n, s in seconds.items() if n % every and n > every)
        shares.append((statistics.median(due) - plain) / (100 * plain))
    detail = f"{steps // every} updates in each of {rounds} rounds"
    what = "share of RigL updates at interval 100 (demo ViT, nm)"
    return row(what, "rewire", shares, detail)


def memory_row(entry: Row) -> Row:
    """Bytes of parameters, gradients, moments and indices of a layer at 90%, over dense."""
    states = ["none"] if entry.get("permutations") == ["none"] else ["hard", "soft"]
    kinds = choices.sparsities({**entry, "permutations": states})
    hard, *soft = (kept_bytes(kind) / (4 * 4 * 768 * 3072) for kind in kinds)
    what = f"memory of a 768->3072 layer at 90%, {kinds[0].label} / dense"
    return row(what, "memory", [hard], f"soft phase {soft[0]:.3f}" if soft else "")


def kept_bytes(kind: choices.Sparsity) -> int:
    """What training keeps of such a layer between steps, once it has rewired."""
    cfg, learner = compose("dst=set"), kind.learner()
    algorithm, layer = build(cfg.dst, "dst"), nn.Sequential(nn.Linear(768, 3072, bias=False))
    sparsify(layer, [Rule("0")], structure=kind.structure, density=0.1, learner=learner)
    optimizer, _ = build(cfg.optimizer, "optimizer").create(layer, total_steps=100)
    learner.start(soft_choices(layer))

    def step() -> None:
        layer(torch.zeros(1, 768)).sum().backward()
        optimizer.step()
        learner.step(0.3)

    step()
    for name, weight in sparse_weights(layer).items():  # which makes the optimizer remember births
        change = weight.decide(algorithm, step=10, total=100, generator=torch.Generator())
        Moments(optimizer, algorithm.moments).follow(name, weight, weight.adopt(change), 10)
    return tensor_bytes(layer, optimizer, step)["kept_bytes"]


if __name__ == "__main__":
    sys.exit(main())
