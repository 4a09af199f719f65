"""One run of the benchmarks: where it measures, how contenders take turns, what a row says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import nn

from padst_exp.bench.floors import Ceilings
from padst_exp.bench.timing import Call, Timer, captured, reason
from padst_exp.dispatch import device_name
from padst_exp.engine.run_directory import environment
from padst_exp.soft import Learner
from padst_kernels import Backend

Row = dict[str, Any]
Samples = Mapping[str, list[float]]
Cell = TypeVar("Cell")

GRAPH, MAX_GRAPHED = ", CUDA graph", 16
# Kernels of ours, as forms of sparse layers name them; and all of a structure's.
KERNELS = {f"{how}, {b}" for how in ("packed", "exported", "features") for b in get_args(Backend)}
EVERY = "every kernel"
NUMBERS = (
    "p20_ms", "p50_ms", "p80_ms", "rounds", "dense_form", "dense_ms", "ratio", "ratio_q1",
    "ratio_q3", "strongest_form", "strongest_ms", "ratio_strongest", "floor_ms", "floor_share",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute a layer or a model."""

    structure: str = "dense"  # its label; "dense" for none
    form: str  # how weights are stored and multiplied; for sparse layers the kernel, of KERNELS
    modules: Sequence[nn.Module]  # called in turn, so that weights come from memory
    # What PyTorch does by itself, other dense kernels, or neither. Ratios are to the fastest dense
    # one, and to the fastest dense or strong one.
    kind: Literal["dense", "strong", "sparse"] = "sparse"
    scope: str = ""  # which layers of a model are sparse, see `choices.Model.rules`
    permutation: str = "none"  # or "soft", "hard"
    density_asked: float = 1.0
    density: float = 1.0
    trained: bool = True  # whether weights have gradients
    dispatcher: str = ""  # what the dispatcher chose, in one line
    learner: Learner | None = None  # of soft permutations

    @property
    def name(self) -> str:
        """A name that no other contender of a comparison has."""
        return ", ".join(filter(None, (self.structure, self.form, self.permutation, self.scope)))

    def columns(self) -> Row:
        """What rows say of it."""
        names = "structure", "form", "scope", "permutation", "density_asked", "density"
        own = {name: getattr(self, name) for name in names}
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in own.items()}


@dataclass(frozen=True)
class Session:
    """What every suite gets."""

    timer: Timer  # of the device, with the budget of one suite
    dtype: torch.dtype  # of weights and activations
    ceilings: Ceilings  # what the device reaches, measured in this run
    columns: Mapping[str, Any]  # of every row: where and with what it was measured
    rounds: int  # timings of each contender
    say: Callable[[str], None]  # takes a line for a person
    # "" or why a kernel is refused, by label of the structure and name of the kernel; None where
    # nothing was checked, and all may be timed.
    verdicts: Mapping[tuple[str, str], str] | None = None

    @property
    def device(self) -> torch.device:
        """Where everything is measured."""
        return self.timer.device

    def refusal(self, structure: str, form: str) -> str:
        """Why sparse layers of a structure may not be timed in a form; "" where they may."""
        kernel = form.removesuffix(GRAPH)
        if self.verdicts is None or kernel not in KERNELS:
            return ""
        every = self.verdicts.get((structure, EVERY), "")
        return every or self.verdicts.get((structure, kernel), "was not checked")

    def tried(self, name: str, make: Callable[[], Cell]) -> list[Cell]:
        """What `make` makes, in a list; nothing, and a line about `name`, where that fails."""
        try:
            return [make()]
        except Exception as error:  # libraries and compilers raise what they like; others go on
            self.say(f"{name}: skipped, {reason(error)}")
            return []

    def affordable(self, what: str, cells: Sequence[Cell]) -> Iterator[Cell]:
        """`cells` while there is time for one as long as the longest so far; says what is left."""
        longest = 0.0
        for done, cell in enumerate(cells):
            if self.timer.left <= longest:
                self.say(f"{what}: budget spent, {len(cells) - done} of {len(cells)} left out")
                return
            began = time.monotonic()
            yield cell
            longest = max(longest, time.monotonic() - began)

    def compare(
        self,
        about: Row,
        contenders: Sequence[tuple[Contender, Call]],
        *,
        floor: Callable[[Contender, Samples], float] | None = None,
        twins: Mapping[str, Call] | None = None,
        graphs: bool = False,
        block: float = 0.0,
    ) -> list[Row]:
        """Time calls in turn; a row for each, without numbers for what is refused or fails.

        All rows have the columns `about`. `floor` gives the least seconds of a contender from the
        timings of all; `twins` take turns too, but have no row; with `graphs` each contender is
        timed as a CUDA graph, too. A timing takes `block` seconds if the budget allows.
        """
        sides = {one.name: (one, call) for one, call in contenders}
        passes: dict[str, int] = {}
        for one, call in contenders if graphs else ():
            graph = replace(one, form=one.form + GRAPH)
            passes[graph.name] = min(len(one.modules), MAX_GRAPHED)
            sides[graph.name] = graph, captured(call, passes[graph.name])
        notes = {name: self.refusal(one.structure, one.form) for name, (one, _) in sides.items()}
        calls = {name: call for name, (_, call) in sides.items() if not notes[name]}
        timer = self.timer.part(1)
        samples, failed = timer.alternate({**(twins or {}), **calls}, self.rounds, block, passes)
        for name, why in failed.items():
            self.say(f"{name}: skipped, {why}")
        timed = [name for name in sides if name in samples]
        fastest = sorted(timed, key=lambda name: float(np.median(samples[name])))
        usual = [name for name in fastest if sides[name][0].kind == "dense"][:1]
        strong = [name for name in fastest if sides[name][0].kind != "sparse"][:1]
        dense = [(sides[name][0].form, samples[name]) for name in usual + strong]
        rows = []
        for name, (one, _) in sides.items():
            numbers: Row = dict.fromkeys(NUMBERS, "")
            if name in samples:
                least = None if floor is None else floor(one, samples)
                numbers |= _numbers(samples[name], dense, least)
            said = {"dispatcher": one.dispatcher, "note": notes[name] or failed.get(name, "")}
            rows.append({**about, **one.columns(), **numbers, **said, **self.columns})
        return rows


def _numbers(own: list[float], dense: list[tuple[str, list[float]]], floor: float | None) -> Row:
    """Milliseconds in four digits; ratios to the fastest dense contenders, if there are any."""
    low, middle, high = (_milliseconds(value) for value in np.quantile(own, [0.2, 0.5, 0.8]))
    row: Row = {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "rounds": len(own)}
    for prefix, (form, samples) in zip(("dense", "strongest"), dense, strict=False):
        row[f"{prefix}_form"], row[f"{prefix}_ms"] = form, _milliseconds(float(np.median(samples)))
        # Of neighbouring timings.
        half, first, third = np.quantile(np.divide(samples, own), [0.5, 0.25, 0.75]).round(3)
        usual = {"ratio": half, "ratio_q1": first, "ratio_q3": third}
        row |= usual if prefix == "dense" else {"ratio_strongest": half}
    if floor is not None:
        share = round(floor / float(np.median(own)), 3)
        row |= {"floor_ms": _milliseconds(floor), "floor_share": share}
    return row


def _milliseconds(seconds: float) -> float:
    return float(f"{1e3 * seconds:.4g}")


def columns(timer: Timer, dtype: torch.dtype, ceilings: Ceilings) -> Row:
    """Columns of every row: where and with what it is measured."""
    device, run = timer.device, environment(str(timer.device))
    on_cpu, packages = device.type == "cpu", run["packages"]
    assert isinstance(packages, dict)
    return {
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability() if on_cpu else "",
        "threads": torch.get_num_threads() if on_cpu else "",
        "clock": timer.clock,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__.partition("+")[0],
        "triton": packages["triton"] or "",
        "commit": str(run["git_commit"] or "unknown")[:10],
        "dirty": run["git_dirty"],
        "copy_gb_per_s": round(ceilings.bandwidth / 1e9, 1),
        "gemm_gflops": round(ceilings.rate / 1e9, 1),
    }
