"""What was measured of speed, results/kernels/*.csv, as the page needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from padst_exp.bench import tables
from padst_exp.files import one_line, reading

LINEAR, WHOLE = "layers", "model_inference"
FORWARD = ("forward", "inference")
NEAR = 1e-6


@dataclass(frozen=True)
class Speed:
    """How many times as fast as dense a structure is.

    Args:
        usual: against the faster of eager and compiled PyTorch.
        strongest: against the fastest dense product there is.
    """

    usual: float
    strongest: float


@dataclass(frozen=True)
class Bar:
    """One contender of a pass: milliseconds, and the least that the machine allows."""

    name: str
    structure: str
    milliseconds: float
    floor: float
    usual: float
    strongest: float


@dataclass(frozen=True)
class Measured:
    """One table of results/kernels.

    Args:
        name: of its file.
        where: device, dtype, threads, versions and commit, as it says itself.
        frame: its rows, as `bench.tables.read` gives them.
    """

    name: str
    where: str
    frame: pd.DataFrame

    @property
    def device(self) -> str:
        """Device and dtype."""
        first = self.frame.iloc[0]
        return one_line(f"{first.device}, {first['dtype']}")

    @property
    def unit(self) -> str:
        """What `tokens` counts."""
        return "tokens" if self.frame["case"].str.contains("->").any() else "samples"

    @property
    def tokens(self) -> int:
        """The number of tokens that stands for training and batches: the largest but one."""
        sizes = sorted(set(self.frame.tokens))
        sizes = [size for size in sizes if size > 0]
        return int(sizes[-2] if len(sizes) > 1 else sizes[-1])

    def speed(self, structure: str, sparsity: float, *, permuted: bool) -> Speed | None:
        """Median over layers of the fastest kernel, forward; None where it was not measured."""
        frame = self.frame
        own = frame[
            frame["pass"].isin(FORWARD) & (frame.tokens == self.tokens) & frame.ratio.notna()
            & frame.scope.isin(["", "all"]) & (frame.structure == structure) & frame.ours
            & ((frame.density_asked - (1 - sparsity)).abs() < NEAR)
        ]  # fmt: skip
        hard = own.permutation == "hard"
        # Folded in, a permutation costs little: without one, a layer is no slower.
        own = own[hard if permuted or not (~hard).any() else own.permutation == "none"]
        if own.empty:
            return None
        best = own.loc[own.groupby("case").ratio.idxmax()]
        return Speed(float(best.ratio.median()), float(best.ratio_strongest.median()))

    def bars(self) -> tuple[str, list[Bar]]:
        """The first case at the first density, forward, the fastest form of each contender."""
        frame = self.frame
        own, tokens = frame[frame["pass"].isin(FORWARD) & frame.final], self.tokens
        if own.empty:
            return "", []
        own = own[own.tokens == tokens] if (own.tokens == tokens).any() else own
        case = own["case"].iloc[0]
        density = own.density_asked[own.density_asked < 1].iloc[0]
        own = own[(own["case"] == case) & own.density_asked.isin([density, 1.0])]
        best = own.loc[own.groupby("name", sort=False).ratio.idxmax()].sort_values("p50_ms")
        title = f"{case}, {tokens} {self.unit}, forward, "
        floors = pd.to_numeric(best.floor_ms, errors="coerce")
        return one_line(f"{title}density {density:g}"), [
            Bar(
                one_line(str(row.name)), str(row.structure), float(row.p50_ms), float(floor),
                float(row.ratio), float(row.ratio_strongest),
            )
            for (_, row), floor in zip(
                best.drop(columns="name").set_index(best.name).iterrows(), floors, strict=True
            )
        ]  # fmt: skip


def read(folder: Path, suites: Sequence[str] = (LINEAR, WHOLE)) -> list[Measured]:
    """The tables of some suites that lie in a folder; none where there is no folder.

    Raises:
        UserError: one of them is damaged.
    """
    found = []
    for suite in suites:
        for path in sorted(folder.glob(f"{suite}-*.csv")):
            with reading("kernels", path, "a table that padst_exp.bench wrote"):
                frame = tables.read(path)
                for column in ("tokens", "density_asked"):
                    frame[column] = pd.to_numeric(frame[column])
                if frame.empty or not np.isfinite(frame.density_asked).all():
                    raise ValueError("it has no sound rows")
                where = one_line(tables.WHERE.format(**frame.iloc[0]))
                table = Measured(path.name, where, frame)
                table.bars()
            found.append(table)
    return found
