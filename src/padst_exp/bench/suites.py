"""From the keys of a run to its files; and `gpu_all`, everything a GPU is wanted for at once.

    python -m padst_exp.bench suite=gpu_all out=results/kernels

runs the tests marked `gpu` first, which compare every kernel with float64. Then come the suites
that `gpu_all` in conf/bench.yaml lists, each in a process of its own and within so many seconds, so
that one that crashes or hangs takes no other along. Tables are written case by case: a run that is
killed leaves what it has.

To carry to a machine with PyTorch, Triton, timm, transformers, pandas, scipy and pytest: a clone of
the repository, and hydra-core, omegaconf, antlr4-python3-runtime, pydantic and pydantic-core as
wheels where they are missing. Nothing is downloaded. To carry back: the folder `out`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from padst_exp.bench import layers, models, tables
from padst_exp.bench.choices import Keys, keys_of
from padst_exp.bench.session import Session, Timer, columns, measure_ceilings
from padst_exp.config import config_dir
from padst_exp.errors import UserError, require

ROOT = config_dir().parent


def run(cfg: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[Path]:
    """Run a suite; the files that it writes, each as soon as it is complete.

    Args:
        cfg: conf/bench.yaml with what the command line changed, in plain containers.
        say: takes a line for a person.

    Raises:
        UserError: the device cannot do what is asked, a key is wrong, no structure is legal, or
            the results cannot be written.
    """
    if cfg["suite"] == "gpu_all":
        gpu_all(cfg, say)
        return
    keys = keys_of(cfg)
    out = Path(keys.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"out: expected a folder to write to, got {out}: {error}") from None
    accuracies = ROOT / "results" / "tables"
    # What PyTorch says of its sparse formats, which are peers here.
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    session = start(keys, say)
    path, rows = out / f"{keys.suite}-{label(session.columns)}.csv", []
    # What stands there already is read now: measuring takes hours.
    tables.introduction(out / "README.md")
    tables.sections(out, accuracies, without=path)
    for case in (layers if keys.measure == "layers" else models).run(keys, session):
        rows.append(case)
        tables.write(path, pd.concat(rows))  # now, since a run can be killed
    if not rows:
        raise UserError("sparsities: expected one that is legal somewhere; see the lines above")
    yield path
    yield from tables.publish(out, accuracies)


def gpu_all(cfg: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Check all kernels, then run the suites of `gpu_all`, each within its seconds."""
    require(
        torch.cuda.is_available(), "suite", "gpu_all", "another one, since there is no GPU here"
    )
    whole = (ROOT / "tests" / "gpu").is_dir()
    require(whole, "suite", "gpu_all", "a checkout, whose tests come first, or another one")
    tests = ["pytest", "-q", "-m", "gpu", "-n", str(os.cpu_count()), "tests/gpu"]
    parts = [(f"{cfg['check_seconds']}", tests)]
    for part in cfg["gpu_all"]:
        suite = ["padst_exp.bench", f"out={Path(cfg['out']).resolve()}", *part["overrides"]]
        parts.append((f"{part['seconds']}", suite))
    for seconds, command in parts:
        timed = ["timeout", "--signal=KILL", seconds, sys.executable, "-m", *command]
        status = subprocess.run(timed, cwd=ROOT, check=False).returncode
        say(f"{' '.join(command)}: {'done' if status == 0 else f'ended with status {status}'}")


def start(keys: Keys, say: Callable[[str], None]) -> Session:
    """Choose the device, measure its ceilings.

    Raises:
        UserError: the device cannot do what is asked.
    """
    found = torch.cuda.is_available()
    require(found or keys.device != "cuda", "device", "cuda", "cpu, since there is no GPU here")
    device = torch.device("cuda" if found and keys.device != "cpu" else "cpu")
    timer = Timer(device, "wall" if device.type == "cuda" else keys.clock)
    torch.set_num_threads(keys.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, keys.dtype or {"cpu": "float32", "cuda": "bfloat16"}[device.type])
    say("measuring what the device can reach")
    ceilings = measure_ceilings(timer, dtype)
    about = columns(timer, dtype, ceilings)
    # Weights that are trained have single precision.
    lower = keys.measure in ("training", "memory") and dtype != torch.float32
    own, autocast = (torch.float32, dtype) if lower else (dtype, None)
    return Session(timer, own, autocast, ceilings, about, keys.rounds, say)


def label(columns: Mapping[str, Any]) -> str:
    """Part of a file name, such as `nvidia-h200-bfloat16` or `amd-epyc-2-threads-float32`."""
    name = re.sub(r"[^a-z0-9]+", "-", columns["device"].lower()).strip("-")
    threads = f"-{columns['threads']}-threads" if columns["threads"] not in ("", 1) else ""
    return f"{name}{threads}-{columns['dtype']}"
