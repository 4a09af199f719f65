"""From the keys of a run to its files; and `gpu_all`, everything a GPU is wanted for at once.

    python -m padst_exp.bench suite=gpu_all out=results/kernels

checks every kernel against float64 first, by `pytest -m gpu tests/gpu`; what failed or was not
checked is not used. Then it times what `gpu_all` in conf/bench.yaml lists, within ten minutes.
Tables are written case by case, so that a run which is killed leaves what it has.

To carry to a machine with PyTorch, Triton, timm, transformers, pandas, scipy and pytest: a clone of
the repository, and hydra-core, omegaconf, antlr4-python3-runtime, pydantic and pydantic-core as
wheels where they are missing. Nothing is downloaded. To carry back: the folder `out`.
"""

from __future__ import annotations

import json
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

from padst_exp.bench import layers, models, tables, timing
from padst_exp.bench.keys import Keys, filled
from padst_exp.bench.session import Session, columns
from padst_exp.bench.timing import Timer
from padst_exp.config import config_dir
from padst_exp.errors import UserError, require

CHECK_SECONDS = 150
ROOT = config_dir().parent
Verdicts = dict[tuple[str, str], str]


def run(cfg: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[Path]:
    """Run a suite; the files that it writes, each as soon as it is complete.

    Args:
        cfg: conf/bench.yaml with what the command line changed, in plain containers.
        say: takes a line for a person.

    Raises:
        UserError: the device cannot do what is asked, a key is wrong, no structure is legal, or
            the results cannot be written.
    """
    # What PyTorch says of its sparse formats, which are peers here.
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    gpu_all, found = cfg["suite"] == "gpu_all", torch.cuda.is_available()
    wanted = "cuda" if gpu_all else cfg["device"]
    require(found or wanted != "cuda", "device", "cuda", "cpu, since there is no GPU here")
    device = torch.device("cuda" if found and wanted != "cpu" else "cpu")
    parts = cfg["gpu_all"] if gpu_all else [{"suite": cfg["suite"]}]
    keys = [filled(cfg, part, device.type) for part in parts]
    out = Path(keys[0].out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"out: expected a folder to write to, got {out}: {error}") from None
    verdicts = check_kernels(keys, say) if gpu_all else None
    frames: dict[Path, list[pd.DataFrame]] = {}
    for own in keys:
        session = start(own, device, say, verdicts)
        path = out / f"{own.suite}-{label(session.columns)}.csv"
        rows = frames.setdefault(path, [])
        for case in (layers if own.measure == "layers" else models).run(own, session):
            rows.append(case)
            tables.write(path, pd.concat(rows))  # now, since a run can be killed
        if rows:
            yield path
            yield from tables.publish(out, ROOT / "results" / "tables")
    if not any(frames.values()):
        raise UserError("sparsities: expected one that is legal somewhere; see the lines above")


def start(
    keys: Keys, device: torch.device, say: Callable[[str], None], verdicts: Verdicts | None = None
) -> Session:
    """What a suite needs; measures the ceilings of the device."""
    clock = keys.clock if device.type == "cpu" else "wall"
    torch.set_num_threads(keys.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, keys.dtype or {"cpu": "float32", "cuda": "bfloat16"}[device.type])
    say(f"{keys.suite}: measuring what the device can reach")
    ceilings = timing.ceilings(Timer(device, clock, None), dtype)
    timer = Timer(device, clock, keys.budget)
    about = columns(timer, dtype, ceilings)
    return Session(timer, dtype, ceilings, about, keys.rounds, say, verdicts)


def label(columns: Mapping[str, Any]) -> str:
    """Part of a file name, such as `nvidia-h200-bfloat16` or `amd-epyc-2-threads-float32`."""
    name = re.sub(r"[^a-z0-9]+", "-", columns["device"].lower()).strip("-")
    threads = f"-{columns['threads']}-threads" if columns["threads"] not in ("", 1) else ""
    return f"{name}{threads}-{columns['dtype']}"


def check_kernels(keys: list[Keys], say: Callable[[str], None]) -> Verdicts:
    """Run the tests marked `gpu` on the structures of all parts; see `read_verdicts`."""
    structures = {json.dumps(entry): entry for own in keys for entry in own.structures}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "verdicts.jsonl")
        command = [
            *("timeout", "--signal=KILL", f"{CHECK_SECONDS}"),  # with all that pytest has started
            *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", f"{os.cpu_count()}"),
            *("tests/gpu", f"--verdicts={path}", f"--dtype={keys[0].dtype or 'bfloat16'}"),
            f"--structures={json.dumps(list(structures.values()))}",
        ]
        subprocess.run(command, cwd=ROOT, check=False)
        verdicts = read_verdicts(path)
    refused = [f"{backend} of {label}, {why}" for (label, backend), why in verdicts.items() if why]
    say(f"gpu_all: {len(verdicts)} kernels checked, refused: {'; '.join(refused) or 'none'}")
    return verdicts


def read_verdicts(path: Path) -> Verdicts:
    """Why the kernels of each structure and backend are refused, or "", as tests/gpu tell.

    A test can end its process or never end. So its first line says that it did not end, and its
    last what it found. A kernel must have passed in all tests that check it.
    """
    if not path.exists():
        return {}
    frame = pd.read_json(path, lines=True).drop_duplicates(
        ["structure", "backend", "test"], keep="last"
    )
    return dict(frame.groupby(["structure", "backend"]).reason.max())
