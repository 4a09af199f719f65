"""Suite `memory`: what a training step keeps and what it peaks at, sparse beside dense.

Tensors are counted in bytes. The peak is what the device allocated at most (GPU), or by how much
the resident memory of a fresh process grew beyond what it had before the model was built (CPU).
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from padst_exp.bench import models
from padst_exp.bench.configurations import Model, describe
from padst_exp.bench.keys import BenchSchema
from padst_exp.bench.model_cases import each_model
from padst_exp.bench.model_train import step
from padst_exp.bench.models import Variant
from padst_exp.bench.report import SCOPES, Row
from padst_exp.bench.session import Session
from padst_exp.layers import SparseLinear, SparseWeight
from padst_exp.structures import Structure

SUITE = "memory"
MODELS = ["vit", "gpt2"]
BATCHES = {"cpu": {False: [16], True: [1]}, "cuda": {False: [256], True: [16]}}
STEPS = 2


@dataclass(frozen=True)
class Usage:
    """Bytes of one side of a training step.

    Args:
        parameters: all of them, soft permutations too.
        gradients: of the last step.
        moments: of the optimizers.
        indices: what sparse layers hold beside their parameters.
        peak: of everything, activations included.
    """

    parameters: int
    gradients: int
    moments: int
    indices: int
    peak: int


def run(settings: BenchSchema, session: Session) -> Iterator[list[Row]]:
    """Weigh a step of every model; every side in a process of its own.

    Raises:
        UserError: an unknown model or structure.
    """
    return each_model(settings, session, suite=SUITE, case=case, models=MODELS, batches=BATCHES)


@dataclass(frozen=True)
class Side:
    """What one process builds; `structure` is None for the dense model."""

    structure: Structure | None
    density: float
    scope: str
    soft: bool


def case(
    session: Session,
    model: Model,
    batch: int,
    structures: Sequence[Structure],
    density: float,
    scopes: Sequence[str],
) -> list[Row]:
    """All rows of one model at one batch size, the dense one first; none without a sparse one."""
    sides = [Side(None, 1.0, "", False)]
    sides += [
        Side(structure, density, scope, soft)
        for structure, scope in itertools.product(structures, scopes)
        for soft in models.phases(structure)
    ]
    dense, realised = measured(session, model, batch, sides[0])
    rows = [_row(session, model, batch, sides[0], dense, realised, dense)]

    def rows_of(side: Side) -> list[Row]:
        usage, realised = measured(session, model, batch, side)
        return [_row(session, model, batch, side, usage, realised, dense)]

    for side in sides[1:]:
        if session.budget.left < 0:
            session.say(f"{SUITE}: budget spent, sides of {model.name} left out")
            break
        rows += session.tried(f"{_name(side)} in {model.name}", partial(rows_of, side))
    return rows if len(rows) > 1 else []


def _name(side: Side) -> str:
    return "dense" if side.structure is None else describe(side.structure)


def measured(session: Session, model: Model, batch: int, side: Side) -> tuple[Usage, float]:
    """`weigh`; on a CPU in a process that has built nothing else."""
    if session.device.type == "cuda":
        return weigh(session, model, batch, side)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(weigh, session.portable(), model, batch, side).result()


def weigh(session: Session, model: Model, batch: int, side: Side) -> tuple[Usage, float]:
    """Bytes of training steps of one side in this process, and the density it has.

    Raises:
        UserError: the structure cannot hold that density in a layer of the model.
    """
    torch.set_num_threads(int(str(session.environment["threads"] or 1)))
    # One block first, for what every process loads once.
    small = replace(model, sizes={**model.sizes, "depth": 1})
    step(session, small, _variant(session, small, 1, side), 1)()
    _give_back()
    before = _now(session.device)
    variant = _variant(session, model, batch, side)
    optimizers: list[torch.optim.Optimizer] = []
    call = step(session, model, variant, batch, optimizers)
    _give_back()
    _forget_peak(session.device)
    for _ in range(STEPS):
        call()
    peak = _peak(session.device) - before
    module = variant.module
    usage = Usage(
        parameters=_bytes(module.parameters()),
        gradients=_bytes(p.grad for p in module.parameters() if p.grad is not None),
        moments=_bytes(
            tensor
            for optimizer in optimizers
            for state in optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, Tensor) and tensor.ndim > 0
        ),
        indices=_bytes(_indices(module)),
        peak=peak,
    )
    return usage, variant.density


def _variant(session: Session, model: Model, batch: int, side: Side) -> Variant:
    if side.structure is None:
        module = model.build().to(session.device)
        return Variant(structure="dense", form="eager", module=module, side="dense")
    return models.sparse_variants(
        session, model, side.structure, side.density, side.scope,
        batch=batch, training=True, soft=side.soft,
    )[0]  # fmt: skip


def _indices(module: nn.Module) -> Iterable[Tensor]:
    """Buffers of sparse layers and what is inside them."""
    for layer in module.modules():
        if isinstance(layer, SparseLinear | SparseWeight):
            yield from layer.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors, shared memory once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _give_back() -> None:
    """Return freed memory to the operating system: building a sparse model takes a dense one."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def _forget_peak(device: torch.device) -> None:
    """Start anew with the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) << 10


def _row(
    session: Session,
    model: Model,
    batch: int,
    side: Side,
    usage: Usage,
    density: float,
    reference: Usage,
) -> Row:
    structure = _name(side)
    permutation = "none"
    if side.structure is not None:
        permutation = models.permutation(side.structure, soft=side.soft)
    accuracy = session.accuracies.of(structure, side.density, side.scope)
    return {
        "suite": SUITE,
        "case": model.name,
        "batch": batch,
        "structure": structure,
        "scope": SCOPES.get(side.scope, ""),
        "permutation": permutation,
        "density_asked": round(side.density, 4),
        "density": round(density, 4),
        **{f"{name}_bytes": size for name, size in asdict(usage).items()},
        "kept_share": round(_kept(usage) / _kept(reference), 4),
        "peak_share": round(usage.peak / reference.peak, 4),
        "accuracy": accuracy if side.structure is not None else "",
        **session.environment,
    }


def _kept(usage: Usage) -> int:
    return usage.parameters + usage.gradients + usage.moments + usage.indices
