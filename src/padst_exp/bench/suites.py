"""From the keys of a run to its files; and `gpu_all`, everything a GPU is wanted for at once.

    python -m padst_exp.bench suite=gpu_all out=results/kernels

checks every kernel against float64 first, by `pytest tests/gpu`; what failed or was not checked is
not timed. Then it times what `gpu_all` in conf/bench.yaml lists, all within 450 seconds. Tables are
written case by case, so that a run which is killed leaves what it has.

To carry to a machine with PyTorch, Triton, timm, transformers, pandas, scipy and pytest: a clone of
the repository (conf/, tests/ and pyproject.toml are needed), and hydra-core, omegaconf,
antlr4-python3-runtime, pydantic and pydantic-core as wheels where they are missing. Nothing is
downloaded. To carry back: the folder `out`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from padst_exp.bench import floors, layers, memory, models, tables
from padst_exp.bench.session import EVERY, Row, Session, columns, label
from padst_exp.bench.timing import Budget, Clock, reason
from padst_exp.config import BenchSchema, config_dir
from padst_exp.errors import UserError

SUITES: dict[str, Callable[[BenchSchema, Session], Iterator[list[Row]]]] = {
    "layers": layers.run,
    "model_inference": models.run,
    "model_train": models.run,
    "memory": memory.run,
}
GPU_SECONDS, CHECK_SECONDS = 450.0, 150.0
ROOT = config_dir().parent
Verdicts = dict[tuple[str, str], str]


def run(settings: BenchSchema, say: Callable[[str], None]) -> Iterator[Path]:
    """Run a suite; the files that it writes, each as soon as it is complete.

    Raises:
        UserError: the device cannot do what is asked, a name is unknown, no structure is legal, or
            the results cannot be written.
    """
    # What PyTorch says of its sparse formats, which are peers here.
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    out = Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"out: expected a folder to write to, got {out}: {error.strerror}") from None
    session = start(settings, say)
    parts: list[dict[str, Any]] = [{"suite": settings.suite}]
    if settings.suite == "gpu_all":
        session = replace(session, verdicts=check_kernels(settings, session))
        parts = settings.gpu_all
    rows: dict[Path, list[Row]] = defaultdict(list)
    for part in parts:
        told = filled(settings, part, session.device.type)
        path = out / f"{told.suite}-{label(session.columns)}.csv"
        for case in _cases(told, session, part.get("share", 1.0), alone=len(parts) == 1):
            rows[path] += case
            if rows[path]:
                tables.write(path, rows[path])  # now, since a run can be killed
        if rows[path]:
            yield path
            yield from tables.publish(out, ROOT / "results" / "tables")
    if not any(rows.values()):
        raise UserError(
            "sparsities: none is legal for any of the structures in these layers; the lines above "
            "say what is"
        )


def _cases(
    told: BenchSchema, session: Session, share: float, *, alone: bool
) -> Iterator[list[Row]]:
    """The rows of each case; an error ends a part of several without the others."""
    rounds = told.rounds
    assert rounds is not None
    session = replace(session, rounds=rounds, budget=session.budget.part(share))
    try:
        yield from SUITES[told.suite](told, session)
    except Exception as error:
        if alone:
            raise
        session.say(f"{told.suite}: ended by {reason(error)}")


def filled(settings: BenchSchema, part: Mapping[str, Any], device: str) -> BenchSchema:
    """`settings` with the keys of a part, and of `usual`, where they are null."""
    usual = settings.usual[part["suite"]]
    own = {**usual, **usual[device], **part}
    keys = {key: value for key, value in own.items() if getattr(settings, key, "") is None}
    return replace(settings, suite=part["suite"], **keys)


def start(settings: BenchSchema, say: Callable[[str], None]) -> Session:
    """Choose the device, measure its ceilings.

    Raises:
        UserError: the device cannot do what is asked.
    """
    found = torch.cuda.is_available()
    if settings.device == "cuda" and not found:
        raise UserError("device: cuda is not available on this machine; use cpu or auto")
    device = torch.device("cuda" if found and settings.device != "cpu" else "cpu")
    if settings.suite == "gpu_all" and device.type == "cpu":
        why = "device=cpu excludes it" if found else "there is none on this machine"
        raise UserError(f"suite: gpu_all needs a GPU, and {why}")
    if device.type == "cuda" and settings.clock == "cpu":
        raise UserError("clock: cpu is for device=cpu; a GPU is timed with clock=wall")
    seconds = settings.budget or (GPU_SECONDS if settings.suite == "gpu_all" else float("inf"))
    budget, clock = Budget(seconds), Clock(device, settings.clock)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype or {"cpu": "float32", "cuda": "bfloat16"}[device.type])
    say("measuring what the device can reach")
    ceilings = floors.ceilings(clock, dtype)
    return Session(
        clock, torch.Generator(device).manual_seed(0), dtype, ceilings,
        columns(clock, dtype, ceilings), budget, settings.rounds or 1, say,
    )  # fmt: skip


def check_kernels(settings: BenchSchema, session: Session) -> Verdicts:
    """Run tests/gpu on the structures and the dtype of this run; what may be timed.

    A test can end its process or never end: what it did not get to say is no verdict, and what has
    none may not be timed.
    """
    structures = settings.structures or settings.usual["layers"]["structures"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "verdicts.jsonl")
        dtype = str(session.dtype).removeprefix("torch.")
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(os.cpu_count()),
            "tests/gpu", f"--verdicts={path}", f"--dtypes={dtype}",
            f"--structures={json.dumps(structures)}",
        ]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            process.wait(min(CHECK_SECONDS, session.budget.left))
        except subprocess.TimeoutExpired:
            session.say("gpu_all: the checks did not end in time")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = path.read_text().splitlines() if path.exists() else []
    found = read_verdicts(lines)
    refused = sorted(f"{form} of {name}" for (name, form), why in found.items() if why)
    passed = len([why for why in found.values() if not why])
    session.say(f"gpu_all: {passed} kernels passed; refused: {', '.join(refused) or 'none'}")
    return found


def read_verdicts(lines: list[str]) -> Verdicts:
    """Why each kernel of each structure is refused, or "", from lines of JSON of tests/gpu.

    A test says of every kernel of its structure that it did not end, and takes that back when it
    ended; of a kernel that several tests check, each must have passed.
    """
    last: dict[tuple[str, str, str], str] = {}
    for line in lines:
        said = json.loads(line)
        last[said["structure"], said["kernel"], said["test"]] = said["reason"]
    found: Verdicts = {}
    for (structure, kernel, _), why in last.items():
        found[structure, kernel] = found.get((structure, kernel)) or why
    return {key: why for key, why in found.items() if why or key[1] != EVERY}
