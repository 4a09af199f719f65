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
import math
import os
import re
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

import pandas as pd
import torch

from padst_exp.bench import floors, layers, models, tables
from padst_exp.bench.keys import Keys
from padst_exp.bench.session import Row, Session, columns
from padst_exp.bench.timing import Timer
from padst_exp.config import config_dir
from padst_exp.errors import UserError

GPU_SECONDS, CHECK_SECONDS = 450.0, 150.0
ROOT = config_dir().parent
Verdicts = dict[tuple[str, str], str]


def run(keys: Keys, say: Callable[[str], None]) -> Iterator[Path]:
    """Run a suite; the files that it writes, each as soon as it is complete.

    Raises:
        UserError: the device cannot do what is asked, a name is unknown, no structure is legal, or
            the results cannot be written.
    """
    # What PyTorch says of its sparse formats, which are peers here.
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    out = Path(keys.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"out: expected a folder to write to, got {out}: {error}") from None
    session = start(keys, say)
    parts: list[dict[str, Any]] = [{"suite": keys.suite}]
    if keys.suite == "gpu_all":
        session = replace(session, verdicts=check_kernels(keys, session))
        parts = keys.gpu_all
    rows: dict[Path, list[Row]] = defaultdict(list)
    for part in parts:
        own = keys.filled(part, session.device.type)
        path = out / f"{own.suite}-{label(session.columns)}.csv"
        assert own.rounds is not None
        timer = session.timer.part(part.get("share", 1.0))
        suite = layers.run if own.suite == "layers" else models.run
        for case in suite(own, replace(session, rounds=own.rounds, timer=timer)):
            rows[path] += case
            if rows[path]:
                tables.write(path, rows[path])  # now, since a run can be killed
        if rows[path]:
            yield path
            yield from tables.publish(out, ROOT / "results" / "tables")
    if not any(rows.values()):
        raise UserError("sparsities: expected one that is legal somewhere; see the lines above")


def label(columns: Mapping[str, Any]) -> str:
    """Part of a file name, such as `nvidia-h200-bfloat16` or `amd-epyc-2-threads-float32`."""
    name = re.sub(r"[^a-z0-9]+", "-", columns["device"].lower()).strip("-")
    threads = f"-{columns['threads']}-threads" if columns["threads"] not in ("", 1) else ""
    return f"{name}{threads}-{columns['dtype']}"


def start(keys: Keys, say: Callable[[str], None]) -> Session:
    """Choose the device, measure its ceilings.

    Raises:
        UserError: the device cannot do what is asked.
    """
    found, gpu_all = torch.cuda.is_available(), keys.suite == "gpu_all"
    if not found and (keys.device == "cuda" or gpu_all):
        key = "suite: gpu_all" if gpu_all else "device: cuda"
        raise UserError(f"{key} needs a GPU, and there is none on this machine")
    device = torch.device("cuda" if found and keys.device != "cpu" else "cpu")
    if (gpu_all and device.type == "cpu") or (keys.clock == "cpu" and device.type == "cuda"):
        raise UserError(f"device: expected another one for suite={keys.suite} and "
                        f"clock={keys.clock}, got {keys.device}")  # fmt: skip
    timer = Timer(device, keys.clock, keys.budget or (GPU_SECONDS if gpu_all else math.inf))
    torch.set_num_threads(keys.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, keys.dtype or {"cpu": "float32", "cuda": "bfloat16"}[device.type])
    say("measuring what the device can reach")
    ceilings = floors.ceilings(timer, dtype)
    return Session(timer, dtype, ceilings, columns(timer, dtype, ceilings), 1, say)


def check_kernels(keys: Keys, session: Session) -> Verdicts:
    """Run tests/gpu on the structures and the dtype of this run; see `read_verdicts`."""
    structures = keys.structures or keys.usual["layers"]["structures"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "verdicts.jsonl")
        options = {"verdicts": path, "dtype": session.columns["dtype"],
                   "structures": json.dumps(structures)}  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(os.cpu_count()), "tests/gpu"]
        command += [f"--{key}={value}" for key, value in options.items()]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            process.wait(min(CHECK_SECONDS, session.timer.left))
        except subprocess.TimeoutExpired:
            session.say("gpu_all: the checks did not end in time")
            os.killpg(process.pid, signal.SIGKILL)
        verdicts = read_verdicts(path)
    refused = [f"{kernel} of {structure}" for (structure, kernel), why in verdicts.items() if why]
    session.say(
        f"gpu_all: {len(verdicts)} kernels checked, refused: {', '.join(refused) or 'none'}"
    )
    return verdicts


def read_verdicts(path: Path) -> Verdicts:
    """Why each kernel of each structure is refused, or "", from lines of JSON of tests/gpu.

    A test can end its process or never end. So it says first that all kernels of its structure did
    not end, and takes that back at last. A kernel must have passed in all tests that check it; what
    is in no line was not checked.
    """
    if not path.exists():
        return {}
    frame = pd.read_json(path, lines=True).drop_duplicates(
        ["structure", "kernel", "test"], keep="last"
    )
    return dict(frame.groupby(["structure", "kernel"]).reason.max())
