"""One run of the benchmarks: where it measures, how contenders take turns, what a row says."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn

from padst_exp.bench.floors import Ceilings
from padst_exp.bench.timing import Budget, Call, Clock, alternate, captured, ratio, reason, runnable
from padst_exp.dispatch import device_name
from padst_exp.engine.run_directory import environment
from padst_exp.permutations import Learner
from padst_exp.structures import Backend

Row = dict[str, object]
Cell = TypeVar("Cell")
Made = TypeVar("Made")

# Shortest timing in seconds: long enough for the clock, or for a GPU to settle.
BLOCK = {"cpu": 3e-3, "cuda": 2e-2}
GRAPH = ", CUDA graph"
MAX_GRAPHED = 16
# Forms of sparse layers that run kernels of ours.
KERNELS = {f"{how}, {b}" for how in ("packed", "exported", "features") for b in get_args(Backend)}
# Stands for all kernels of a structure in the verdicts of tests/gpu.
EVERY = "every kernel"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute a layer or a model.

    Args:
        structure: label of the structure, "dense" for none.
        form: how weights are stored and multiplied. For sparse layers that is their kernel, whose
            checks must have passed: "packed, triton".
        modules: alike but for their values; called in turn, so that weights come from memory.
        product: what one of `modules` does with x `[T, I]`.
        kind: "dense" for what PyTorch does by itself, "strong" for other dense kernels, or
            "sparse"; ratios are to the fastest dense, and to the fastest dense or strong one.
        scope: which layers of a model are sparse, see `choices.Model.rules`.
        permutation: "none", "soft" or "hard".
        density_asked: share of entries that sparse layers were to have.
        density: share that they have.
        trained: whether weights have gradients.
        most_tokens: tokens up to which this form is meant to run.
        dispatcher: what the dispatcher chose, in one line.
        learner: learner of soft permutations.
    """

    structure: str = "dense"
    form: str
    modules: Sequence[nn.Module]
    product: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)
    kind: Literal["dense", "strong", "sparse"] = "sparse"
    scope: str = ""
    permutation: str = "none"
    density_asked: float = 1.0
    density: float = 1.0
    trained: bool = True
    most_tokens: float = inf
    dispatcher: str = ""
    learner: Learner | None = None

    @property
    def name(self) -> str:
        """A name that no other contender of a comparison has."""
        return ", ".join(filter(None, (self.structure, self.form, self.permutation, self.scope)))


@dataclass(frozen=True)
class Session:
    """What every suite gets.

    Args:
        clock: timer of the device.
        generator: generator on the device. A failed capture can spoil PyTorch's own.
        dtype: dtype of weights and activations.
        ceilings: what the device reaches, measured in this run.
        columns: columns of every row: where and with what it was measured.
        budget: seconds for one suite.
        rounds: timings of each contender.
        say: takes a line for a person.
        verdicts: "" or why a kernel is refused, by label of the structure and name of the kernel;
            None where nothing was checked, and all may be timed.
    """

    clock: Clock
    generator: torch.Generator
    dtype: torch.dtype
    ceilings: Ceilings
    columns: Mapping[str, object]
    budget: Budget
    rounds: int
    say: Callable[[str], None]
    verdicts: Mapping[tuple[str, str], str] | None = None

    @property
    def device(self) -> torch.device:
        """The device that the clock waits for."""
        return self.clock.device

    def random(self, *size: int) -> Tensor:
        """Normal activations."""
        return torch.randn(size, generator=self.generator, device=self.device, dtype=self.dtype)

    def refusal(self, structure: str, form: str) -> str:
        """Why sparse layers of a structure may not be timed in a form; "" where they may."""
        kernel = form.removesuffix(GRAPH)
        if self.verdicts is None or kernel not in KERNELS:
            return ""
        every = self.verdicts.get((structure, EVERY), "")
        return every or self.verdicts.get((structure, kernel), "was not checked")

    def backends(self, structure: str) -> list[Backend]:
        """Backends whose products may be used in training."""
        return [b for b in get_args(Backend) if not self.refusal(structure, f"packed, {b}")]

    def tried(self, name: str, make: Callable[[], list[Made]]) -> list[Made]:
        """What `make` makes; nothing, and a line about `name`, where that fails."""
        try:
            return make()
        except Exception as error:  # libraries and compilers raise what they like; others go on
            self.say(f"{name}: skipped, {reason(error)}")
            return []

    def affordable(self, suite: str, cells: Sequence[Cell]) -> Iterator[Cell]:
        """`cells` while there is time for one as long as the longest so far; says what is left."""
        longest = 0.0
        for done, cell in enumerate(cells):
            if self.budget.left <= longest:
                self.say(f"{suite}: budget spent, {len(cells) - done} of {len(cells)} cells left")
                return
            began = time.monotonic()
            yield cell
            longest = max(longest, time.monotonic() - began)

    def compare(
        self,
        about: Row,
        contenders: Sequence[tuple[Contender, Call]],
        *,
        floor: Callable[[Contender, Mapping[str, list[float]]], float] | None = None,
        twins: Mapping[str, Call] | None = None,
        graphs: bool = False,
        block: float = 0.0,
    ) -> list[Row]:
        """Time calls in turn; a row for each, without numbers for what is refused or fails.

        Args:
            about: columns of all rows: suite, case, tokens and pass.
            contenders: what is timed, and the call that does it.
            floor: least seconds of one, given the timings of all.
            twins: calls that take turns too, but have no row.
            graphs: whether each is timed as a CUDA graph, too.
            block: seconds that a timing takes at least, if the budget allows.
        """
        sides = {one.name: (one, call) for one, call in contenders}
        passes: dict[str, int] = {}
        for one, call in contenders if graphs else ():
            twice = replace(one, form=one.form + GRAPH)
            passes[twice.name] = min(len(one.modules), MAX_GRAPHED)
            sides[twice.name] = twice, captured(call, self.device, passes[twice.name])
        failed = {
            name: why
            for name, (one, _) in sides.items()
            if (why := self.refusal(one.structure, one.form))
        }
        calls = {name: call for name, (_, call) in sides.items() if name not in failed}
        budget = self.budget.part(1)
        ran, broken = runnable({**(twins or {}), **calls}, self.clock, budget)
        for name, why in broken.items():
            self.say(f"{name}: skipped, {why}")
        # Every timing comes after as long a call that is not timed, at worst.
        fair = max(0.0, budget.left) / (2 * self.rounds * max(1, len(ran)))
        least = BLOCK[self.device.type]
        samples = alternate(
            ran, self.clock, rounds=self.rounds, block=max(least, min(block, fair)),
            budget=budget, passes=passes,
        )  # fmt: skip
        kinds = {name: one.kind for name, (one, _) in sides.items() if name in samples}
        medians = {name: float(np.median(samples[name])) for name in kinds}
        usual = min((n for n in kinds if kinds[n] == "dense"), key=medians.__getitem__, default="")
        strong = min(
            (n for n in kinds if kinds[n] != "sparse"), key=medians.__getitem__, default=""
        )
        rows = []
        for name, (one, _) in sides.items():
            numbers = dict.fromkeys(NUMBERS, "")
            if name in samples:
                least = floor(one, samples) if floor is not None else None
                numbers |= _numbers(samples, name, usual, strong, least)
            note = failed.get(name) or broken.get(name, "")
            rows.append({**about, **_columns(one), **numbers, "dispatcher": one.dispatcher,
                         "note": note, **self.columns})  # fmt: skip
        return rows


NUMBERS = (
    "p20_ms", "p50_ms", "p80_ms", "rounds", "dense_form", "dense_ms", "ratio", "ratio_q1",
    "ratio_q3", "strongest_form", "strongest_ms", "ratio_strongest", "floor_ms", "floor_share",
)  # fmt: skip


def _columns(one: Contender) -> Row:
    return {
        "structure": one.structure,
        "form": one.form,
        "scope": one.scope,
        "permutation": one.permutation,
        "density_asked": round(one.density_asked, 4),
        "density": round(one.density, 4),
    }


def _numbers(
    samples: Mapping[str, list[float]], name: str, usual: str, strong: str, floor: float | None
) -> Row:
    """Milliseconds in four digits, and ratios."""
    own = samples[name]
    low, middle, high = (_digits(1e3 * value) for value in np.quantile(own, [0.2, 0.5, 0.8]))
    row: Row = {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "rounds": len(own)}
    if usual:
        ratios = [round(value, 3) for value in ratio(samples[usual], own)]
        row |= {"dense_form": usual, "dense_ms": _digits(1e3 * float(np.median(samples[usual])))}
        row |= dict(zip(("ratio", "ratio_q1", "ratio_q3"), ratios, strict=True))
    if strong:
        row["strongest_form"] = strong
        row["strongest_ms"] = _digits(1e3 * float(np.median(samples[strong])))
        row["ratio_strongest"] = round(ratio(samples[strong], own)[0], 3)
    if floor is not None:
        row |= {
            "floor_ms": _digits(1e3 * floor),
            "floor_share": round(floor / float(np.median(own)), 3),
        }
    return row


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def columns(clock: Clock, dtype: torch.dtype, ceilings: Ceilings) -> Row:
    """Columns of every row: where and with what it is measured."""
    device, run = clock.device, environment(str(clock.device))
    on_cpu, packages = device.type == "cpu", run["packages"]
    assert isinstance(packages, dict)
    return {
        "device": device_name(device),
        "instructions": torch.backends.cpu.get_cpu_capability() if on_cpu else "",
        "threads": torch.get_num_threads() if on_cpu else "",
        "clock": clock.kind,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__.partition("+")[0],
        "triton": packages["triton"] or "",
        "commit": str(run["git_commit"] or "unknown")[:10],
        "dirty": run["git_dirty"],
        "copy_gb_per_s": round(ceilings.bandwidth / 1e9, 1),
        "gemm_gflops": round(ceilings.rate / 1e9, 1),
    }


def label(columns: Mapping[str, object]) -> str:
    """Part of a file name, such as `nvidia-h200-bfloat16` or `amd-epyc-2-threads-float32`."""
    name = re.sub(r"[^a-z0-9]+", "-", str(columns["device"]).lower()).strip("-")
    threads = f"-{columns['threads']}-threads" if columns["threads"] not in ("", 1) else ""
    return f"{name}{threads}-{columns['dtype']}"
