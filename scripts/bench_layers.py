"""Sparse layers against dense ones on a CPU. PYTHONPATH=src:kernels python scripts/bench_layers.py

Every row is timed through the product that training uses (or, for one entry per unit, through the
condensed form that inference uses), in eager mode, tokens first, in turn with `nn.functional
.linear` in the same process. Weights are rotated through more memory than the last-level cache
holds, as inside a model. Ratios are dense time / sparse time: the median over rounds of the two
neighbouring timings, with its quartiles. Writes results/kernels/cpu_layers.csv and README.md.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from padst_exp.structures import NM, Block, Diagonal, Layout, Product, Structure, Unstructured
from padst_kernels.fan_in import condense, fan_in_linear

SHAPES = [(768, 3072), (3072, 768), (768, 768)]  # inputs, outputs
TOKENS = [1, 8, 197, 788]
DENSITY = 0.1
STRUCTURES: dict[str, Structure] = {
    "nm group=64": NM(n=1, m=None, group=64),
    "nm group=16": NM(n=1, m=None, group=16),
    "block size=64": Block(size=64, balanced=False),
    "block size=32": Block(size=32, balanced=False),
    "diag stride=32": Diagonal(bundle="stride", stride=32, width=1),
    "nm group=1": NM(n=1, m=None, group=1),
    "unstructured": Unstructured(),
}
ROTATED = 80 << 20  # bytes
TOPOLOGIES = 3
Pass = Callable[[], object]
Side = tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor]]  # a product, weights to rotate


def main() -> None:
    """Time everything, write the tables."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall",
        help="cpu: time of this one thread, for a machine that others share (threads=1 only)",
    )  # fmt: skip
    arguments.add_argument("--compile", action="store_true", help="dense compiled too (minutes)")
    arguments.add_argument("--out", type=Path, default=Path("results/kernels"))
    options = arguments.parse_args()
    if options.clock == "cpu" and options.threads > 1:
        arguments.error("--clock cpu counts one thread only")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter

    rows: list[dict[str, object]] = []
    for dtype_name, (inputs, outputs) in itertools.product(options.dtypes, SHAPES):
        dtype = getattr(torch, dtype_name)
        sides = _weights(inputs, outputs, dtype)
        for tokens, backward in itertools.product(TOKENS, [False, True]):
            if options.compile:
                product = torch.compile(linear, dynamic=False)
                sides["dense compiled"] = (product, sides["dense"][1])
            passes = {
                name: _timed(side, inputs, outputs, tokens, backward, dtype)
                for name, side in sides.items()
                if not (backward and name.endswith("condensed"))
            }
            times = _measure(passes, options.rounds, tokens, clock)
            for name, samples in times.items():
                if name == "dense":
                    continue
                ratios = [d / s for d, s in zip(times["dense"], samples, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                rows.append(
                    {
                        **_environment(options.threads, options.clock),
                        "dtype": dtype_name,
                        "layer": f"{inputs}->{outputs}",
                        "structure": name,
                        "density": DENSITY if name != "dense compiled" else 1.0,
                        "tokens": tokens,
                        "pass": "forward+backward" if backward else "forward",
                        "dense_us": round(statistics.median(times["dense"]) * 1e6, 1),
                        "sparse_us": round(statistics.median(samples) * 1e6, 1),
                        "ratio": round(middle, 2),
                        "ratio_q1": round(low, 2),
                        "ratio_q3": round(high, 2),
                        "rounds": len(samples),
                    }
                )
            print(f"{dtype_name} {inputs}->{outputs} {tokens} tokens", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "cpu_layers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (options.out / "README.md").write_text(_markdown(rows))


def _weights(inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, Side]:
    size = inputs * outputs * dtype.itemsize
    dense = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(_copies(size))]
    sides: dict[str, Side] = {"dense": (linear, dense)}
    for name, structure in STRUCTURES.items():
        layout = structure.layout(outputs, inputs, DENSITY)
        sides[name] = _packed(layout, dtype)
        if layout.unit_size == 1:
            sides[f"{name}, condensed"] = _condensed(layout, dtype)
    return sides


def _copies(size: int) -> int:
    """How many weights of `size` bytes to rotate through."""
    return max(2, min(100, ROTATED // size))


def _packed(layout: Layout, dtype: torch.dtype) -> Side:
    topologies = [Product([layout], "packed") for _ in range(TOPOLOGIES)]
    for product in topologies:
        product.fold([layout.random_units(torch.default_generator)], None, [None])
    shape = (layout.num_active, layout.unit_size)
    values = [
        torch.randn(shape, dtype=dtype) for _ in range(_copies(layout.num_entries * dtype.itemsize))
    ]
    products = {id(v): topologies[i % TOPOLOGIES] for i, v in enumerate(values)}
    return lambda x, v: products[id(v)](x, [v]), values


def _condensed(layout: Layout, dtype: torch.dtype) -> Side:
    entries = layout.entries(layout.random_units(torch.default_generator))
    weight = condense(torch.randn(entries.shape, dtype=dtype), entries, *layout.shape)
    values = [
        torch.randn_like(weight.values)
        for _ in range(_copies(layout.num_entries * (dtype.itemsize + 2)))
    ]
    weights = {id(v): weight._replace(values=v, columns=weight.columns.clone()) for v in values}
    return lambda x, v: fan_in_linear(x, weights[id(v)]), values


def _timed(
    side: Side, inputs: int, outputs: int, tokens: int, backward: bool, dtype: torch.dtype
) -> Pass:
    product, values = side
    rotation = itertools.cycle(values)
    x = torch.randn(tokens, inputs, dtype=dtype, requires_grad=backward)
    dy = torch.randn(tokens, outputs, dtype=dtype)
    for value in values:
        value.requires_grad_(backward)

    def both() -> object:
        weight = next(rotation)
        return torch.autograd.grad(product(x, weight), (x, weight), dy)

    return both if backward else lambda: product(x, next(rotation))


def _measure(
    passes: dict[str, Pass], rounds: int, tokens: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    # As in a model, layers of one kind follow each other: bursts, after a call that is not timed.
    burst = 8 if tokens <= 8 else 1
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, run in passes.items():
            run()
            begin = clock()
            for _ in range(burst):
                run()
            times[name].append((clock() - begin) / burst)
    return times


def _environment(threads: int, clock: str) -> dict[str, object]:
    return {
        "device": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "clock": clock,
        "torch": torch.__version__.split("+")[0],
        "commit": _commit(),
    }


def _processor() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _markdown(rows: list[dict[str, object]]) -> str:
    first = rows[0]
    text = [
        "# Sparse layers against dense ones",
        "",
        "Made by `scripts/bench_layers.py`, whose docstring says how; all numbers, with quartiles, "
        "are in cpu_layers.csv.",
        "",
        f"{first['device']} ({first['instructions']}), {first['threads']} thread, {first['clock']} "
        f"time, torch {first['torch']}, commit {first['commit']}; density {DENSITY}. Dense time / "
        "sparse time: above 1 the sparse layer is faster. Speed alone: no accuracy belongs to "
        "these random topologies.",
    ]
    cells = {
        (r["dtype"], r["pass"], r["structure"], r["layer"], r["tokens"]): r["ratio"] for r in rows
    }
    layers = [f"{inputs}->{outputs}" for inputs, outputs in SHAPES]
    for dtype, which in dict.fromkeys((r["dtype"], r["pass"]) for r in rows):
        heads = [f"{layer}, {tokens}" for layer in layers for tokens in TOKENS]
        text += ["", f"## {dtype}, {which}", "", f"| layer, tokens | {' | '.join(heads)} |"]
        text += ["|---" * (1 + len(heads)) + "|"]
        for name in dict.fromkeys(r["structure"] for r in rows):
            keys = [(dtype, which, name, layer, t) for layer in layers for t in TOKENS]
            if keys[0] in cells:
                text.append(f"| {name} | {' | '.join(str(cells[key]) for key in keys)} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
