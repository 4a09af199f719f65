"""Suite `memory`: what a training step keeps and what it peaks at, sparse beside dense.

Tensors are counted in bytes. The peak is what the device allocated at most (GPU), or by how much
the resident memory of a fresh process grew beyond what it had before the model was built (CPU).
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from padst_exp.bench import models
from padst_exp.bench.choices import Model, Sparsity
from padst_exp.bench.session import Contender, Row, Session
from padst_exp.bench.timing import Budget
from padst_exp.config import BenchSchema
from padst_exp.layers import SparseLinear, SparseWeight

STEPS = 2
KEPT = ("parameters_bytes", "gradients_bytes", "moments_bytes", "indices_bytes")
# Structure, density, scope and permutation; None for the dense model.
Side = tuple[Sparsity, float, str, str] | None


def run(settings: BenchSchema, session: Session) -> Iterator[list[Row]]:
    """Weigh a step of every model; on a CPU every side in a process of its own.

    Raises:
        UserError: an unknown model or structure.
    """
    sides: list[Side] = [
        (*kind, state) for kind in models.kinds(settings) for state in kind[0].phases
    ]
    for model, batch, name in models.cases(settings, session):
        yield session.tried(name, partial(_case, session, model, batch, sides))


def _case(session: Session, model: Model, batch: int, sides: list[Side]) -> list[Row]:
    """All rows of one model at one batch size, the dense one first; none without a sparse one."""
    rows: list[Row] = []
    for done, side in enumerate([None, *sides]):
        if session.budget.left < 0:
            session.say(f"memory: budget spent, {len(sides) + 1 - done} sides left out")
            break
        name = "dense" if side is None else f"{side[0].label}, {side[3]}"
        for row in session.tried(name, lambda side=side: [_measured(session, model, batch, side)]):
            first = rows[0] if rows else row
            kept, reference = (sum(int(str(r[key])) for key in KEPT) for r in (row, first))
            row["kept_share"] = round(kept / reference, 4)
            row["peak_share"] = round(
                int(str(row["peak_bytes"])) / int(str(first["peak_bytes"])), 4
            )
            rows.append({**row, **session.columns})
    return rows if len(rows) > 1 else []


def _measured(session: Session, model: Model, batch: int, side: Side) -> Row:
    """The row of one side; on a CPU from a process that has built nothing else."""
    if session.device.type == "cuda":
        return weigh(session, model, batch, side)
    portable = replace(session, say=_nothing, budget=Budget())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(weigh, portable, model, batch, side).result()


def _nothing(line: str) -> None:
    pass


def weigh(session: Session, model: Model, batch: int, side: Side) -> Row:
    """Bytes of training steps of one side in this process.

    Raises:
        UserError: the structure cannot hold that density in a layer of the model.
    """
    torch.set_num_threads(int(str(session.columns["threads"] or 1)))
    # One block first, for what every process loads once.
    small = replace(model, node=OmegaConf.merge(model.node, {"depth": 1}))
    models.step(session, small, _contender(session, small, 1, side), 1)[0]()
    _give_back()
    before = _resident(session.device, "VmRSS")
    one = _contender(session, model, batch, side)
    call, optimizers = models.step(session, model, one, batch)
    _give_back()
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        call()
    peak = _resident(session.device, "VmHWM") - before
    module = one.modules[0]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    moments = [t for state in states for t in state.values() if isinstance(t, Tensor) and t.ndim]
    sizes = {
        "parameters_bytes": _bytes(module.parameters()),
        "gradients_bytes": _bytes(p.grad for p in module.parameters() if p.grad is not None),
        "moments_bytes": _bytes(moments),
        "indices_bytes": _bytes(_indices(module)),
        "peak_bytes": peak,
    }
    return {
        "suite": "memory", "case": model.label, "tokens": batch, "structure": one.structure,
        "scope": one.scope, "permutation": one.permutation,
        "density_asked": round(one.density_asked, 4), "density": round(one.density, 4), **sizes,
    }  # fmt: skip


def _contender(session: Session, model: Model, batch: int, side: Side) -> Contender:
    if side is None:
        return Contender(form="eager", modules=[model.build().to(session.device)])
    kind, density, scope, state = side
    return models.sparse(
        session, model, kind, density, scope, batch, training=True, permutation=state
    )[0]


def _indices(module: nn.Module) -> Iterator[Tensor]:
    """Buffers of sparse layers and of what is inside them."""
    for layer in module.modules():
        if isinstance(layer, SparseLinear | SparseWeight):
            yield from layer.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, shared memory once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _give_back() -> None:
    """Return freed memory to the operating system: building a sparse model takes a dense one."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _resident(device: torch.device, key: str) -> int:
    """Bytes in use now ("VmRSS") or at most ("VmHWM")."""
    if device.type == "cuda":
        now = key == "VmRSS"
        return (torch.cuda.memory_allocated if now else torch.cuda.max_memory_allocated)(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) << 10
