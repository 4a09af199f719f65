"""From the keys of a run to its files: start a session, run one suite, write what came out."""

from __future__ import annotations

from pathlib import Path

import torch

from padst_exp.bench import environment, layers, report, roofline
from padst_exp.bench.accuracy import Accuracies
from padst_exp.bench.session import Say, Session
from padst_exp.bench.timing import Budget, Clock
from padst_exp.config import BenchSchema
from padst_exp.dispatch import device_name
from padst_exp.errors import UserError

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# Accuracies stand beside the folder of the results, or where the checkout has them.
TABLES = "results/tables"


def run(settings: BenchSchema, say: Say) -> list[Path]:
    """Run a suite; the files that it left.

    Raises:
        UserError: the device cannot do what is asked.
    """
    session = start(settings, say)
    rows = {"layers": layers.run}[settings.suite](settings, session)
    out = Path(settings.out)
    name = f"{settings.suite}-{environment.label(session.device, session.dtype)}"
    report.write_csv(out / f"{name}.csv", rows)
    return [out / f"{name}.csv"]


def start(settings: BenchSchema, say: Say) -> Session:
    """Choose the device, measure its ceilings."""
    device = _device(settings)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype or DTYPES[device.type])
    clock = Clock(device, settings.clock)
    say(f"measuring what {device_name(device)} can reach")
    return Session(
        clock=clock,
        dtype=dtype,
        environment=environment.environment(device, dtype, settings.clock),
        ceilings=roofline.measure(clock, dtype),
        accuracies=Accuracies(Path(TABLES)),
        budget=Budget(settings.budget),
        rounds=settings.rounds,
        say=say,
    )


def _device(settings: BenchSchema) -> torch.device:
    found = torch.cuda.is_available()
    if settings.device == "cuda" and not found:
        raise UserError("device: cuda is not available on this machine; use cpu or auto")
    on_gpu = found and settings.device != "cpu"
    if settings.suite == "gpu_all" and not on_gpu:
        raise UserError("suite: gpu_all needs a GPU and there is none; use layers, memory, ...")
    if on_gpu and settings.clock == "cpu":
        raise UserError("clock: cpu is for CPUs, a GPU is timed with wall")
    return torch.device("cuda" if on_gpu else "cpu")
