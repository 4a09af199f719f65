"""Pictures of a run: its curves, its topologies and permutations before and after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from padst_exp.atomic import replacing
from padst_exp.layers import SparseLinear, SparseWeight
from padst_exp.permutations import Permutation

Rows = Sequence[Mapping[str, Any]]

BLUE, ORANGE, GREEN, GREY, INK = "#2f6db3", "#e07b39", "#3a9a6b", "#b9bec6", "#22262e"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 7,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#eceef1",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 110,
}
PLOTTED_LAYERS = 4
MAX_PIXELS = 384


def plot_curves(rows: Rows, metric: str, baselines: Mapping[str, float], path: Path) -> None:
    """Draw loss, watched metric, churn and penalties over the steps.

    Args:
        rows: of `metrics.jsonl`.
        metric: the watched one.
        baselines: horizontal lines beside the metric of the same name.
        path: PNG to write.
    """
    of = {
        kind: [row for row in rows if row["kind"] == kind]
        for kind in ("train", "eval", "rewire", "soft", "harden")
    }
    panels = ["loss", "metric"]
    panels += ["topology"] if of["rewire"] else []
    panels += ["penalty"] if of["soft"] else []
    with rc_context(STYLE):
        across = 2 if len(panels) == 4 else len(panels)
        down = len(panels) // across
        figure = Figure(figsize=(5 * across, 3.2 * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False)
        axes = dict(zip(panels, grid.flat, strict=True))
        _loss(axes["loss"], of["train"], of["eval"])
        _metric(axes["metric"], of["eval"], metric, baselines)
        if "topology" in axes:
            _churn(axes["topology"], of["rewire"])
        if "penalty" in axes:
            _penalties(axes["penalty"], of["soft"], of["harden"])
        last = max((row["step"] for row in rows), default=1)
        for axis in axes.values():
            axis.set_xlim(0, last * 1.01)
            _mark_hardening(axis, of["harden"], labelled=axis is axes["loss"])
        axes["loss"].legend()
        for axis in grid[-1]:
            axis.set_xlabel("step")
        save_figure(figure, path)


def _loss(axis: Axes, train: Rows, held: Rows) -> None:
    axis.set_title("Loss (nats)")
    axis.plot(_steps(train), [row["loss"] for row in train], color=BLUE, lw=1.2, label="training")
    axis.plot(
        _steps(held),
        [row["loss"] for row in held],
        color=ORANGE,
        lw=1.4,
        marker="o",
        ms=3,
        label="validation",
    )


def _metric(axis: Axes, held: Rows, metric: str, baselines: Mapping[str, float]) -> None:
    axis.set_title(f"Validation {metric}")
    values = [row[metric] for row in held]
    averaged = [row[f"ema_{metric}"] for row in held if f"ema_{metric}" in row]
    axis.plot(_steps(held), values, color=ORANGE, lw=1.4, marker="o", ms=3, label="model")
    if averaged:
        axis.plot(_steps(held), averaged, color=GREEN, lw=1.4, marker="o", ms=3, label="average")
    for name, value in baselines.items():
        if metric in name:
            axis.axhline(value, color=INK, lw=1, ls=(0, (4, 3)), label=f"{name} {value:.4g}")
    top = [*values, *averaged]
    # Perplexities start orders of magnitude above where they end.
    if min(top) > 0 and max(top) / min(top) > 20:
        axis.set_yscale("log")
    if len(axis.get_lines()) > 1:
        axis.legend()


def _churn(axis: Axes, rewires: Rows) -> None:
    axis.set_title("Active units replaced (%)")
    axis.vlines(_steps(rewires), 0, [100 * row["churn"] for row in rewires], color=GREEN, lw=2)
    axis.set_ylim(bottom=0)


def _penalties(axis: Axes, rows: Rows, hardened: Rows) -> None:
    axis.set_title("Penalty of soft choices (0: hard)")
    names = list(rows[0]["penalty"])
    for name in names:
        curve = [(row["step"], row["penalty"][name]) for row in rows if name in row["penalty"]]
        axis.plot(*zip(*curve, strict=True), color=BLUE, lw=1, alpha=max(0.25, 1 / len(names)))
    for reason, color, label in (("delta", GREEN, "hardened"), ("deadline", ORANGE, "forced")):
        points = [(row["step"], row["penalty"]) for row in hardened if row["reason"] == reason]
        if points:
            steps, penalties = zip(*points, strict=True)
            axis.scatter(
                steps, penalties, color=color, s=16, zorder=3, label=f"{label} ({len(points)})"
            )
    axis.set_ylim(0, 1.02)
    if hardened:
        axis.legend()


def _mark_hardening(axis: Axes, hardened: Rows, *, labelled: bool) -> None:
    for number, step in enumerate(sorted({row["step"] for row in hardened})):
        label = "they harden" if labelled and number == 0 else None
        axis.axvline(step, color=INK, alpha=0.5, lw=0.9, ls=":", zorder=1, label=label)


def _steps(rows: Rows) -> list[int]:
    return [row["step"] for row in rows]


def plot_topologies(model: nn.Module, initial: Mapping[str, Tensor], path: Path) -> None:
    """Draw mask and permutation of a few layers, before and after training.

    Args:
        model: trained.
        initial: active units of each sparse weight before training, by name.
        path: PNG to write; nothing is written for a model without sparse weights.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, SparseLinear)]
    if not layers:
        return
    picks = sorted({round(i) for i in np.linspace(0, len(layers) - 1, PLOTTED_LAYERS)})
    chosen = [layers[i] for i in picks]
    bare: Any = {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}
    with rc_context({**STYLE, **bare}):
        figure = Figure(figsize=(11.6, 3.1 * len(chosen)), layout="constrained")
        grid = figure.subplots(len(chosen), 4, squeeze=False)
        for axes, (name, layer) in zip(grid, chosen, strict=True):
            weight = layer.weights[0]
            assert isinstance(weight, SparseWeight)
            before = initial[f"{name}.weights.0"]
            rows, columns = weight.shape
            title = f"{name}.weights.0" if len(layer.weights) > 1 else name
            cut = ", upper left corner" if max(rows, columns) > MAX_PIXELS else ""
            axes[0].set_ylabel(f"{title}\n{rows} x {columns}{cut}")
            _mask(axes[0], weight, before, None)
            _mask(axes[1], weight, weight.active, before)
            permutation = _first_permutation(layer)
            if permutation is None:
                axes[2].set_title("No permutation")
                axes[2].set_axis_off()
                axes[3].set_axis_off()
            else:
                _permutation(axes[2], permutation, permutation.initial, "Permutation, start")
                what = "Soft matrix" if permutation.soft else "Permutation"
                end = f"{what}, end: {100 * (1 - permutation.agreement()):.0f}% moved"
                _permutation(axes[3], permutation, permutation.nearest(), end)
        save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture in the format that the name of `path` says, whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def _mask(axis: Axes, weight: SparseWeight, active: Tensor, before: Tensor | None) -> None:
    """Draw active entries; those that were not active `before` stand out."""
    image, title = _image(weight, active), "Mask, start"
    if before is not None:
        kept = active[torch.isin(active, before)]
        image = 2 * image - _image(weight, kept)
        title = f"Mask, end: {100 * (1 - len(kept) / len(active)):.0f}% new"
    axis.imshow(
        image,
        cmap=ListedColormap(["#eef0f3", BLUE, ORANGE]),
        vmin=0,
        vmax=2,
        aspect="auto",
        interpolation="nearest",
    )
    axis.set_title(title)
    axis.set_xticks([])
    axis.set_yticks([])


def _image(weight: SparseWeight, active: Tensor) -> NDArray[np.int64]:
    """Return which entries are active; large weights are cut to their upper left corner."""
    rows, columns = weight.shape
    entries = weight.geometry.entries(active.long()).flatten().cpu()
    mask = np.zeros(rows * columns + 1, dtype=np.int64)
    mask[entries.numpy()] = 1
    return mask[:-1].reshape(rows, columns)[:MAX_PIXELS, :MAX_PIXELS]


def _first_permutation(layer: SparseLinear) -> Permutation | None:
    for permutation in (layer.input_permutation, *layer.output_permutations):
        if isinstance(permutation, Permutation):
            return permutation
    return None


def _permutation(axis: Axes, permutation: Permutation, index: Tensor, title: str) -> None:
    """Draw a dot for each feature; those that do not stand where they began stand out."""
    size = permutation.size
    moved = (index != permutation.initial).cpu().numpy()
    axis.scatter(
        index.cpu().numpy(),
        np.arange(size),
        s=max(0.8, 560 / size),
        lw=0,
        c=np.where(moved, ORANGE, BLUE),
    )
    axis.set_facecolor("#f6f7f9")
    axis.set_title(title)
    axis.set_xlim(-1, size)
    axis.set_ylim(size, -1)
    axis.set_xticks([])
    axis.set_yticks([])
