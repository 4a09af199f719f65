"""Suites `model_inference`, `model_train` and `memory`: whole models, sparse beside dense.

A training step is forward, backward and fused AdamW on data that is on the device already, in
single precision or under autocast; in the soft phase the learner of permutations steps too. What
it keeps is counted in bytes of tensors. What it peaks at is what the device allocated at most
(GPU), or by how much the resident memory of a fresh process grew while it had the model (CPU).
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from padst_exp.bench import choices, contenders
from padst_exp.bench.choices import Model, Sparsity
from padst_exp.bench.floors import Work
from padst_exp.bench.keys import Keys
from padst_exp.bench.session import Contender, Row, Session
from padst_exp.bench.timing import Call, Timer
from padst_exp.layers import SparseLinear, SparseWeight
from padst_exp.soft import Learner, soft_choices

# oneDNN packs weights for so many tokens; their order depends on it only where they are few.
PACKED_TOKENS = 4096
# Seconds of one timing: dense products throttle a GPU's clocks, which takes them a while.
BLOCK = {"cpu": 0.0, "cuda": 0.5}
# Completed share of a training, at which the penalty of soft permutations has its full weight.
PROGRESS = 0.3
# Products of a step for each product of a forward pass: y, dX and dW.
TRAINING = 3
KEPT = ("parameters_bytes", "gradients_bytes", "moments_bytes", "indices_bytes")
# Structure, density, scope, and state of the permutations; None for the dense model.
Kind = tuple[Sparsity, float, str, str]
Forward = Callable[[nn.Module, Tensor], Tensor]


def run(keys: Keys, session: Session) -> Iterator[list[Row]]:
    """Measure every model at every batch size; all structures and scopes of one in turn.

    Raises:
        UserError: an unknown model or structure.
    """
    cases = []
    for entry in keys.models or ():
        model, batches = choices.model(entry, keys.images, keys.text), keys.batches
        if isinstance(batches, Mapping):
            batches = batches["text" if model.is_language else "images"]
        cases += [(model, batch) for batch in batches or ()]
    structures = [choices.sparsity(entry) for entry in keys.structures or ()]
    densities = [round(1 - sparsity, 6) for sparsity in keys.sparsities or ()]
    every = itertools.product(structures, densities, keys.scopes or ())
    # Steps of the soft phase take long, and as long whatever the structure is.
    soft = {"memory": structures, "model_train": structures[:1]}.get(keys.suite, [])
    kinds: list[Kind] = [
        (*one, state) for one in every for state in one[0].phases[: 2 if one[0] in soft else 1]
    ]
    training = partial(_time, training=keys.suite == "model_train")
    measure = _memory if keys.suite == "memory" else training
    for model, batch in session.affordable(keys.suite, cases):
        name = f"{model.label} at batch {batch}"
        yield from session.tried(name, partial(measure, session, model, batch, kinds))
        session.say(f"{keys.suite}: {name}")


def sparse(session: Session, model: Model, batch: int, kind: Kind, dtype: torch.dtype) -> Contender:
    """A sparse model with the backends that the dispatcher takes for `batch` samples.

    Raises:
        UserError: the structure cannot hold that density in a layer of the model.
    """
    structure, density, scope, state = kind
    one = contenders.sparse(session, model, structure, density, state, scope, dtype)
    sample = _to(session, model.example(1)[0], dtype)

    def forward() -> None:
        with torch.no_grad(), _autocast(session, dtype):
            one.modules[0](sample)

    return replace(one, dispatcher=contenders.choose(session, one, forward, batch))


def _time(
    session: Session, model: Model, batch: int, kinds: Sequence[Kind], *, training: bool
) -> list[Row]:
    """Dense and sparse models, eager and compiled; no rows where no structure is legal."""
    torch.compiler.reset()
    dtype, sides = torch.float32 if training else session.dtype, []
    inputs, sample = (_to(session, model.example(n)[0], dtype) for n in (batch, 1))
    for kind in session.affordable(f"structures of {model.label}", kinds):
        name = f"{kind[0].label} in {model.label}"
        made = session.tried(name, partial(sparse, session, model, batch, kind, dtype))
        if made and not training:
            pack = partial(contenders.exported_model, session, made[0], inputs)
            made += session.tried(f"{name}, exported", pack)
        sides += [form for one in made for form in (one, contenders.compiled(one, model))]
    if not sides:
        return []
    sides = contenders.dense(session, model, dtype, None if training else PACKED_TOKENS) + sides
    size = model.inputs["context_length" if model.is_language else "image_size"]
    case = f"{model.label}, " + (f"context {size}" if model.is_language else f"{size} pixels")
    passes, rows, device = _passes(model, training), [], session.device.type
    for done, (what, forward) in enumerate(passes.items()):
        part = replace(session, timer=session.timer.part(1 / (len(passes) - done)))
        about: Row = {"suite": "model_train" if training else "model_inference", "case": case,
                      "tokens": batch, "pass": what}  # fmt: skip
        work = Work(sides[0].modules[0], forward, sample)

        def floor(one: Contender, _: object, work: Work = work) -> float:
            operations, weights = work.left(model.rules(one.scope), one.density)
            moved = weights * session.dtype.itemsize / session.ceilings.bandwidth
            seconds = max(batch * operations / session.ceilings.rate, moved)
            return TRAINING * seconds if training else seconds

        calls: list[tuple[Contender, Call]] = [
            (one, step(session, model, one, batch)[0] if training
             else partial(forward, one.modules[0].eval(), inputs)) for one in sides
        ]  # fmt: skip
        with torch.inference_mode(not training):
            graphs = device == "cuda" and not training
            rows += part.compare(about, calls, floor=floor, graphs=graphs, block=BLOCK[device])
    return rows


def _passes(model: Model, training: bool) -> dict[str, Forward]:
    """What is timed, by name; of a language model all logits, and those of the last position."""

    def forward(module: nn.Module, inputs: Tensor) -> Tensor:
        outputs: Tensor = module(inputs)
        return outputs

    if training or not model.is_language:
        return {"training step" if training else "inference": forward}
    return {
        "inference, logits of all positions": forward,
        "inference, logits of the last position": last_logits,
    }


def last_logits(module: nn.Module, tokens: Tensor) -> Tensor:
    """Logits `[B, V]` of the token that follows a prompt `[B, T]`."""
    transformer, head = module.get_submodule("transformer"), module.get_submodule("lm_head")
    logits: Tensor = head(transformer(tokens, use_cache=False).last_hidden_state[:, -1])
    return logits


def step(
    session: Session, model: Model, one: Contender, batch: int
) -> tuple[Call, torch.optim.Optimizer]:
    """One training step on random data as a call, and the optimizer of all but soft choices."""
    module, learner, soft = one.modules[0].train(), one.learner, soft_choices(one.modules[0])
    own = {id(choice.logits) for choice in soft.values()}
    weights = [parameter for parameter in module.parameters() if id(parameter) not in own]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    if learner is not None:
        learner.start(soft)
    inputs, targets = (_to(session, tensor, torch.float32) for tensor in model.example(batch))

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        if learner is not None:
            learner.zero_grad()
        with _autocast(session, torch.float32):
            output = module(inputs)
            loss = nn.functional.cross_entropy(output.flatten(0, -2), targets.flatten())
        loss.backward()
        if learner is not None:
            learner.step(PROGRESS)
        optimizer.step()

    return call, optimizer


def _memory(session: Session, model: Model, batch: int, kinds: Sequence[Kind]) -> list[Row]:
    """Bytes of every side, the dense one first; on a CPU each in a process of its own."""
    rows: list[Row] = []
    for kind in session.affordable(f"sides of {model.label}", [None, *kinds]):
        name = "dense" if kind is None else f"{kind[0].label}, {kind[3]}"
        apart = weigh if session.device.type == "cuda" else _in_a_process
        for row in session.tried(name, partial(apart, session, model, batch, kind)):
            first = rows[0] if rows else row
            for share, parts in {"kept": KEPT, "peak": ("peak_bytes",)}.items():
                own, dense = (sum(r[part] for part in parts) for r in (row, first))
                row[f"{share}_share"] = round(own / dense, 4)
            about = {"suite": "memory", "case": model.label, "tokens": batch}
            rows.append({**about, **row, **session.columns})
    return rows if len(rows) > 1 else []


def _in_a_process(session: Session, model: Model, batch: int, kind: Kind | None) -> Row:
    timer = Timer(session.device, session.timer.clock, math.inf)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        session = replace(session, say=_nothing, timer=timer)
        return pool.submit(weigh, session, model, batch, kind).result()


def _nothing(line: str) -> None:
    pass


def weigh(session: Session, model: Model, batch: int, kind: Kind | None) -> Row:
    """Bytes of training steps of one side in this process.

    Raises:
        UserError: the structure cannot hold that density in a layer of the model.
    """
    torch.set_num_threads(int(session.columns["threads"] or 1))

    def prepared(model: Model, batch: int) -> tuple[Contender, Call, torch.optim.Optimizer]:
        if kind is None:
            module = model.build().to(session.device)
            one = Contender(form="eager", modules=[module])
        else:
            one = sparse(session, model, batch, kind, torch.float32)
        return one, *step(session, model, one, batch)

    # One block first, for what every process loads once.
    prepared(model.shallow(), 1)[1]()
    _give_back()
    before = _resident(session.device, "VmRSS")
    one, call, optimizer = prepared(model, batch)
    _give_back()
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        call()
    peak = _resident(session.device, "VmHWM") - before
    parameters = list(one.modules[0].parameters())
    sparse_parts = (
        m for m in one.modules[0].modules() if isinstance(m, SparseLinear | SparseWeight)
    )
    gradients = (p.grad for p in parameters if p.grad is not None)
    tensors = parameters, gradients, moments(optimizer, one.learner)
    indices = (buffer for part in sparse_parts for buffer in part.buffers())
    sizes = dict(zip(KEPT, map(tensor_bytes, (*tensors, indices)), strict=True))
    return {**one.columns(), **sizes, "peak_bytes": peak}


def moments(optimizer: torch.optim.Optimizer, learner: Learner | None) -> list[Tensor]:
    """What the optimizers of values and of soft choices remember."""
    states = list(optimizer.state.values())
    if learner is not None:
        states += (learner.state_dict()["optimizer"] or {"state": {}})["state"].values()
    return [t for state in states for t in state.values() if isinstance(t, Tensor) and t.ndim]


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, shared memory once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _give_back() -> None:
    """Return freed memory to the operating system: building a sparse model takes a dense one."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # of glibc


def _resident(device: torch.device, key: str) -> int:
    """Bytes in use now ("VmRSS") or at most ("VmHWM")."""
    if device.type == "cuda":
        read = torch.cuda.memory_allocated if key == "VmRSS" else torch.cuda.max_memory_allocated
        return read(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def _autocast(session: Session, dtype: torch.dtype) -> torch.autocast:
    """Autocast to the dtype of the session where weights are wider."""
    lower = session.dtype != torch.float32 and dtype == torch.float32
    return torch.autocast(session.device.type, session.dtype, enabled=lower)


def _to(session: Session, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs or targets where the model is, in the dtype of its weights."""
    return tensor.to(session.device, dtype if tensor.is_floating_point() else tensor.dtype)
