"""One picture for each part of an analysis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from padst_exp.engine.plots import BLUE, GREEN, GREY, INK, ORANGE, STYLE, save_figure

Results = Any
KINDS = {
    "sparse": BLUE,
    "product": "#7fa8d6",
    "head": "#b6cfea",
    "attention": ORANGE,
    "norm": GREEN,
    "activation": "#9ccfb4",
    "other": GREY,
}


def draw_cost(results: Results, path: Path) -> None:
    """FLOPs and bytes of a forward pass by kind, dense and sparse."""
    with _figure(path, across=2, height=2.4) as axes:
        for axis, key, title in zip(
            axes, ("flops", "bytes"), ("FLOPs of one sample", "Bytes moved"), strict=True
        ):
            place = 0 if key == "flops" else 1
            most = max(results["dense"][key], results[key])
            for row, (name, one) in enumerate((("dense", results["dense"]), ("sparse", results))):
                left = 0.0
                for kind, color in KINDS.items():
                    value = one["kinds"].get(kind, (0, 0))[place]
                    label = kind if row == 0 or kind == "sparse" else None
                    axis.barh(row, value, left=left, color=color, height=0.62, label=label)
                    left += value
                axis.text(left + 0.01 * most, row, f"{one[key]:.3g}", va="center", fontsize=8)
                del name
            axis.set_xlim(0, 1.16 * most)
            axis.set_yticks([0, 1], ["dense", "sparse"])
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
            axis.set_title(title)
        handles, labels = axes[0].get_legend_handles_labels()
        used = dict(zip(labels, handles, strict=True))
        axes[1].figure.legend(
            used.values(), used.keys(), ncols=len(used), loc="outside lower center"
        )


def draw_spectrum(results: Results, path: Path) -> None:
    """The four metrics along training: every mask, and their mean."""
    names = {
        "gap": "Ramanujan gap",
        "imdb": "Mean gap of regular subgraphs (imdb)",
        "weighted_gap": "Weighted spectral gap",
        "imsg": "Weighted gap of subgraphs (imsg)",
    }
    with _figure(path, across=2, down=2) as axes:
        steps = [row["step"] for row in results]
        weights = [name for name in results[0] if name not in ("step", "mean")]
        for axis, (key, title) in zip(axes, names.items(), strict=True):
            for weight in weights:
                values = [row[weight][key] for row in results]
                _line(axis, steps, values, color=BLUE, lw=0.9, alpha=0.35)
            means = [row["mean"][key] for row in results]
            _line(axis, steps, means, color=INK, lw=1.8, marker="o", ms=3, label="mean over masks")
            axis.set_title(title)
            axis.set_xlabel("step")
        axes[0].legend()


def draw_paths(results: Results, path: Path) -> None:
    """Reachability and spectral ratio after each consecutive mask, at the end of training."""
    last = results[-1]
    kinds = (
        ("trained", BLUE, "as trained"),
        ("unpermuted", ORANGE, "without its permutations"),
        ("random", GREY, "random, equal density"),
    )
    with _figure(path, across=2) as axes:
        for axis, key, title in zip(
            axes,
            ("reach", "ratio"),
            (
                "Pairs of input and output that a path connects (%)",
                "Second over first singular value",
            ),
            strict=True,
        ):
            for name, color, label in kinds:
                values = [row[key] * (100 if key == "reach" else 1) for row in last[name]]
                axis.plot(
                    range(1, len(values) + 1), values, color=color, lw=1.5, marker="o", ms=3,
                    label=label,
                )  # fmt: skip
            axis.set_title(title)
            axis.set_xlabel("consecutive masks")
            axis.set_ylim(bottom=0)
        axes[0].set_ylim(0, 104)
        axes[1].set_yscale("symlog", linthresh=1e-3)
        axes[0].legend()


def draw_topology(results: Results, path: Path) -> None:
    """What each update replaced, and the share of units ever active (ITOP)."""
    changes, explored = results["changes"], results["explored"]
    with _figure(path, across=2) as axes:
        axes[0].set_title("Active units replaced by an update (%)")
        axes[0].vlines(
            [row["step"] for row in changes], 0, [100 * r["churn"] for r in changes], color=GREEN
        )
        axes[0].set_ylim(bottom=0)
        axes[1].set_title("Units ever active (%)")
        steps = [row["step"] for row in explored]
        for weight in explored[0]["explored"]:
            values = [100 * row["explored"][weight] for row in explored]
            axes[1].plot(steps, values, color=BLUE, lw=0.9, alpha=0.35)
        means = [100 * sum(row["explored"].values()) / len(row["explored"]) for row in explored]
        axes[1].plot(steps, means, color=INK, lw=1.8, marker="o", ms=3, label="mean over weights")
        axes[1].set_ylim(0, 104)
        axes[1].legend()
        for axis in axes:
            axis.set_xlabel("step")


def draw_permutations(results: Results, path: Path) -> None:
    """Distance of each permutation to the identity, and to where it began, at the end."""
    last = results[-1]
    names = list(last["moved_since_start"])
    with _figure(path, across=1, height=max(1.8, 0.2 * len(names) + 1.2)) as axes:
        axis = axes[0]
        if not names:
            axis.set_title("No permutations")
            axis.set_axis_off()
            return
        rows = range(len(names))
        distance = [100 * last["distance"].get(name, 0) for name in names]
        moved = [100 * last["moved_since_start"][name] for name in names]
        axis.barh(
            [row - 0.2 for row in rows], distance, 0.36, color=BLUE, label="from the identity"
        )
        axis.barh([row + 0.2 for row in rows], moved, 0.36, color=ORANGE, label="from the start")
        axis.set_yticks(rows, names, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_title("Features moved (%); from the identity modulo the structure's symmetries")
        axis.grid(axis="y", visible=False)
        axis.figure.legend(loc="outside lower center", ncols=2)


DRAW: Mapping[str, Callable[[Results, Path], None]] = {
    "cost": draw_cost,
    "spectrum": draw_spectrum,
    "paths": draw_paths,
    "topology": draw_topology,
    "permutations": draw_permutations,
}


class _figure:
    """Axes side by side, in the style of a run's pictures; saved at the end."""

    def __init__(self, path: Path, *, across: int, down: int = 1, height: float = 3.2) -> None:
        self.path, self.across, self.down, self.height = path, across, down, height
        self.style = rc_context(STYLE)

    def __enter__(self) -> Sequence[Axes]:
        self.style.__enter__()
        size = (5.2 * self.across, self.height * self.down)
        self.figure = Figure(figsize=size, layout="constrained")
        return list(self.figure.subplots(self.down, self.across, squeeze=False).flat)

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            save_figure(self.figure, self.path)
        self.style.__exit__(*error)  # type: ignore[arg-type]


def _line(axis: Axes, steps: Sequence[int], values: Sequence[float | None], **style: Any) -> None:
    """A curve, where it has values."""
    points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
    if points:
        axis.plot(*zip(*points, strict=True), **style)
