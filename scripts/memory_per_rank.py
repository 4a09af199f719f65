"""What a rank has in memory under trainer.parallel=fsdp: planned, and for a small model measured.

    python scripts/memory_per_rank.py

Planned is counted, in models of one and of two blocks: the others are like the second. Measured is
how much the resident memory of a process grows, at its peak, in three steps on this machine. Writes
results/tables/memory_per_rank.csv.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from runs import Row, compose, write
from torch import Tensor, nn

from padst_exp.data.sampler import train_loader
from padst_exp.data.task import Batch
from padst_exp.engine import distributed
from padst_exp.engine.distributed import World
from padst_exp.engine.evaluation import to_device
from padst_exp.engine.experiment import Experiment
from padst_exp.engine.placement import blocks, placement_of
from padst_exp.engine.state import TrainingState
from padst_exp.engine.step import Stepper
from padst_exp.train import build_experiment

COMMON = ("structure=nm", "sparsity=0.9", "permutation=random", "dst=static", "backend=torch")
IMAGES, TOKENS = "dataset=synthetic_images", "dataset=synthetic_tokens"
# Name, overrides, depth, samples of a rank in a step.
LARGE = (
    ("gpt2_medium", ("model=gpt2_medium", TOKENS, "dataset.pool=2"), 24, 4),
    ("vit_large", ("model=vit_large", IMAGES, "dataset.pool=2"), 24, 32),
)
SMALL = (
    "model=vit",
    IMAGES,
    "dataset.pool=16",
    "dataset.image_size=32",
    "model.patch_size=8",
    "model.depth=4",
)
SAMPLES = 8
RANKS = (1, 2, 4, 8)
MB = 1e6


@dataclass(frozen=True)
class Part:
    """What is whole at a time: a block, or all that is in none.

    Args:
        parameters: shapes of those that are trained.
        indices: bytes of buffers.
    """

    parameters: list[tuple[int, ...]]
    indices: int

    def bytes(self, ranks: int) -> int:
        """Of the rows that the first rank has, in float32."""
        return 4 * sum(math.ceil(s[0] / ranks) * math.prod(s[1:]) for s in self.parameters)


def main() -> None:
    """Plan, measure, write."""
    rows = []
    for name, overrides, depth, samples in LARGE:
        rows += planned(name, overrides, depth, samples)
        print(*rows[-len(RANKS) :], sep="\n")
    for row in planned("vit, depth 4, 16 tokens", SMALL, 4, SAMPLES, counted=SAMPLES):
        if row["ranks"] <= 2:
            rows.append(row | {"measured_mb": measured(row["ranks"])})
            print(rows[-1])
    write("memory_per_rank", rows)


def experiment(overrides: tuple[str, ...], samples: int, world: World, *more: str) -> Experiment:
    """A training of three steps with so many samples of each rank in one."""
    size = f"trainer.batch_size={samples * world.size}"
    length = ("trainer.epochs=null", "trainer.steps=3", "trainer.clip_norm=1.0")
    return build_experiment(compose(*COMMON, *overrides, *length, size, *more), world)


def planned(
    name: str, overrides: tuple[str, ...], depth: int, samples: int, *, counted: int = 1
) -> list[Row]:
    """A row for each number of ranks, of `depth` blocks and so many samples of each rank.

    Activations are counted with `counted` samples; those that all share count as each one's.
    """
    least, more = (
        activations(experiment(overrides, counted, World(), f"model.depth={few}")) for few in (1, 2)
    )
    model = experiment(overrides, 1, World(), "model.depth=2").model
    (elements,) = blocks(model)
    repeated = part_of([elements[0]])
    inside = {module for each in elements for module in each.modules()}
    rest = part_of([module for module in model.modules() if module not in inside], recurse=False)
    kept = (least + (depth - 1) * (more - least)) * samples // counted
    rows = []
    for ranks in RANKS:
        parameters = rest.bytes(ranks) + depth * repeated.bytes(ranks)
        # In a backward pass: what is in no block and two blocks whole, the gradients of the first
        # and of one of these, and that block's once more on their way to other ranks.
        passing = 2 * rest.bytes(1) + 4 * repeated.bytes(1) if ranks > 1 else 0
        sizes = {
            "parameters": parameters,
            "gradients": parameters,
            "moments": 2 * parameters,
            "indices": rest.indices + depth * repeated.indices,
            "passing": passing,
            "activations": kept,
        }
        columns = {f"{what}_mb": round(size / MB, 1) for what, size in sizes.items()}
        # Gradients come where activations go.
        total = sum(sizes.values()) - min(sizes["gradients"], sizes["activations"])
        rows.append(
            {"model": name, "structure": "nm 16", "sparsity": 0.9, "permutation": "hard",
             "precision": "float32", "samples_per_rank": samples, "ranks": ranks, **columns,
             "planned_mb": round(total / MB, 1), "measured_mb": None}
        )  # fmt: skip
    return rows


def part_of(modules: list[nn.Module], *, recurse: bool = True) -> Part:
    """The trained parameters and the buffers of `modules`, each once."""
    parameters = {p for m in modules for p in m.parameters(recurse=recurse) if p.requires_grad}
    buffers = {b for m in modules for b in m.buffers(recurse=recurse)}
    return Part([tuple(p.shape) for p in parameters], sum(b.nbytes for b in buffers))


def activations(made: Experiment) -> int:
    """Bytes that the forward pass of a batch leaves for the backward pass."""
    model = made.model.train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor  # held, or its place would be given to another
        return tensor

    inputs, targets = to_device(next(batches(made, World())), torch.device("cpu"), "float32")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made.task.loss(model(inputs), targets)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def batches(made: Experiment, world: World) -> Iterator[Batch]:
    """The training batches of this rank."""
    return iter(
        train_loader(
            made.task, batch_size=made.trainer.batch_size, micro_batches=1, start_step=0,
            total_steps=made.total_steps, seed=0, rank=world.rank, world_size=world.size, workers=0,
        )
    )  # fmt: skip


def measured(ranks: int) -> float:
    """The peak of a rank, the larger of all, in processes of their own."""
    program = [sys.executable, __file__, "rank"]
    if ranks > 1:
        program = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
                   __file__, "rank"]  # fmt: skip
    # Memory that is free goes back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    return max(json.loads(line) for line in ended.stdout.split())


def rank() -> None:
    """Measure this process, and print megabytes."""
    world = distributed.start("cpu")
    # What libraries take at their first use is no matter here.
    grown(world, (*SMALL, "model.depth=2", "model.dim=32", "model.heads=2"))
    print(round(grown(world, SMALL) / MB, 1), flush=True)
    world.close()


def grown(world: World, overrides: tuple[str, ...]) -> int:
    """Bytes of a training at its peak: what it begins with, and by how much that grows."""
    made = experiment(overrides, SAMPLES, world)
    gc.collect()
    before = status("VmRSS")
    whole = sum(t.nbytes for t in (*made.model.parameters(), *made.model.buffers()))
    placement = placement_of("fsdp", world)
    state = TrainingState(made, placement=placement, saved=None, path=Path())
    stepper = Stepper(made, state, record=lambda kind, values: None, say=lambda line: None)
    given = batches(made, world)
    stepper.step(given)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(2):
        stepper.step(given)
    return status("VmHWM") - before + whole


def status(field: str) -> int:
    """A number of bytes in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    rank() if sys.argv[1:] == ["rank"] else main()
