"""One run of the benchmarks: where it measures, how contenders take turns, what a row says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pandas as pd
import torch
from torch import nn

from padst_exp.bench.timing import Call, Ceilings, Timer, reason
from padst_exp.dispatch import device_name
from padst_exp.engine.run_directory import environment
from padst_exp.soft import Learner

Row = dict[str, Any]
Cell = TypeVar("Cell")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute a layer or a model."""

    structure: str = "dense"  # its label; "dense" for none
    form: str  # how weights are stored and multiplied
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
    passes: int = 1  # that one call makes
    floor: float | None = None  # the least seconds of a pass

    def columns(self) -> Row:
        """What rows say of it."""
        names = "structure", "form", "scope", "permutation", "density_asked", "density"
        return {**{name: getattr(self, name) for name in names}, "density": round(self.density, 4)}


@dataclass(frozen=True)
class Session:
    """What every suite gets."""

    timer: Timer  # of the device
    dtype: torch.dtype  # of weights and activations
    ceilings: Ceilings  # what the device reaches, measured in this run
    columns: Mapping[str, Any]  # of every row: where and with what it was measured
    rounds: int  # timings of each contender
    say: Callable[[str], None]  # takes a line for a person

    @property
    def device(self) -> torch.device:
        """Where everything is measured."""
        return self.timer.device

    def tried(self, name: str, make: Callable[[], Cell]) -> list[Cell]:
        """What `make` makes, in a list; nothing, and a line about `name`, where that fails."""
        try:
            return [make()]
        except Exception as error:  # libraries and compilers raise what they like; others go on
            self.say(f"{name}: skipped, {reason(error)}")
            return []

    def compare(
        self, about: Row, sides: Sequence[tuple[Contender, Call]], block: float = 0.0
    ) -> pd.DataFrame:
        """Time calls in turn: a row for each that runs, with the columns `about`.

        Milliseconds have four digits. A timing takes at least `block` seconds.
        """
        calls = {str(number): call for number, (_, call) in enumerate(sides)}
        seconds, failed = self.timer.alternate(calls, self.rounds, block)
        for number, why in failed.items():
            one = sides[int(number)][0]
            self.say(f"{one.structure}, {one.form}, {one.permutation}: skipped, {why}")
        timed = [sides[int(number)][0] for number in seconds]
        times = 1e3 * pd.DataFrame(dict(enumerate(seconds.values()))) / [o.passes for o in timed]
        rows = pd.DataFrame([{**about, **one.columns()} for one in timed])
        rows[["p20_ms", "p50_ms", "p80_ms"]] = times.quantile([0.2, 0.5, 0.8]).T
        rows["rounds"] = len(times)
        # Ratios of neighbouring timings, to the fastest of some contenders.
        for prefix, column, kinds in (
            ("dense", "ratio", ("dense",)),
            ("strongest", "ratio_strongest", ("dense", "strong")),
        ):
            others = [number for number, one in enumerate(timed) if one.kind in kinds]
            if others:
                best = rows.p50_ms[others].idxmin()
                rows[f"{prefix}_form"], rows[f"{prefix}_ms"] = rows.form[best], rows.p50_ms[best]
                ratios = times.rdiv(times[best], axis=0).quantile([0.5, 0.25, 0.75]).round(3).T
                rows[[column, f"{column}_q1", f"{column}_q3"]] = ratios
        rows["floor_ms"] = 1e3 * pd.Series([one.floor for one in timed], dtype=float)
        rows["floor_share"] = (rows.floor_ms / rows.p50_ms).round(3)
        rows["dispatcher"] = [one.dispatcher for one in timed]
        digits = [column for column in rows if column.endswith("_ms")]
        rows[digits] = rows[digits].map(lambda value: float(f"{value:.4g}"))
        return rows.assign(**self.columns)


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
