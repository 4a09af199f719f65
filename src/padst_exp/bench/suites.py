"""From the keys of a run to its files: start a session, run a suite, write what came out."""

from __future__ import annotations

import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from padst_exp.bench import (
    environment,
    gpu_all,
    layers,
    memory,
    model_inference,
    model_train,
    plots,
    readme,
    report,
    roofline,
)
from padst_exp.bench.accuracy import Accuracies
from padst_exp.bench.keys import BenchSchema
from padst_exp.bench.report import Row
from padst_exp.bench.session import Say, Session
from padst_exp.bench.timing import Budget, Clock
from padst_exp.config import config_dir
from padst_exp.dispatch import device_name
from padst_exp.errors import UserError

SUITES = {
    layers.SUITE: layers.run,
    model_inference.SUITE: model_inference.run,
    model_train.SUITE: model_train.run,
    memory.SUITE: memory.run,
}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def run(settings: BenchSchema, say: Say) -> Iterator[Path]:
    """Run a suite; the files that it writes, each as soon as it is complete.

    Raises:
        UserError: the device cannot do what is asked, a name is unknown, no structure is legal, or
            the results cannot be written.
    """
    # Of PyTorch's sparse formats, which are peers here.
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    out = _folder(settings.out)
    session = start(settings, say)
    label = environment.label(session.device, session.dtype)
    tables: dict[Path, list[Row]] = defaultdict(list)
    for suite, cases in _parts(settings, session):
        table = out / f"{suite}-{label}.csv"
        for rows in cases:
            # Now, and not at the end: a run can be killed.
            tables[table] += rows
            if tables[table]:
                report.write_csv(table, tables[table])
        if tables[table]:
            yield table
            picture = plots.draw(suite, report.read_csv(table), table.with_suffix(".png"))
            if picture is not None:
                yield picture
            yield readme.write(out)
    if not any(tables.values()):
        key = "sparsities" if settings.suite == layers.SUITE else "sparsity"
        raise UserError(
            f"{key}: {getattr(settings, key)} is legal for none of the structures in these layers; "
            "the lines above say what is"
        )


def _folder(out: str) -> Path:
    """The folder of the results, made if need be."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"out: {out} is no folder to write to: {error.strerror}") from None
    return folder


def _parts(settings: BenchSchema, session: Session) -> Iterator[tuple[str, Iterator[list[Row]]]]:
    """Suites, and the rows of each case of them; one suite can come in several parts."""
    if settings.suite == gpu_all.SUITE:
        yield from gpu_all.run(settings, session)
    else:
        yield settings.suite, SUITES[settings.suite](settings, session)


def start(settings: BenchSchema, say: Say) -> Session:
    """Choose the device, measure its ceilings.

    Raises:
        UserError: the device cannot do what is asked.
    """
    device = _device(settings)
    seconds = settings.budget
    if settings.suite == gpu_all.SUITE:
        seconds = seconds or gpu_all.SECONDS
    budget = Budget(seconds)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype or DTYPES[device.type])
    clock = Clock(device, settings.clock)
    say(f"measuring what {device_name(device)} can reach")
    return Session(
        clock=clock,
        generator=torch.Generator(device).manual_seed(0),
        dtype=dtype,
        environment=environment.environment(device, dtype, settings.clock),
        ceilings=roofline.measure(clock, dtype),
        # Those of the checkout; an installed package has none.
        accuracies=Accuracies(config_dir().parent / "results" / "tables"),
        budget=budget,
        rounds=settings.rounds,
        say=say,
    )


def _device(settings: BenchSchema) -> torch.device:
    found = torch.cuda.is_available()
    if settings.device == "cuda" and not found:
        raise UserError("device: cuda is not available on this machine; use cpu or auto")
    on_gpu = found and settings.device != "cpu"
    if settings.suite == gpu_all.SUITE and not on_gpu:
        raise UserError(
            "suite: gpu_all needs a GPU, and "
            + ("device=cpu excludes it" if found else "there is none on this machine")
        )
    if on_gpu and settings.clock == "cpu":
        raise UserError("clock: cpu is for device=cpu; a GPU is timed with clock=wall")
    return torch.device("cuda" if on_gpu else "cpu")
