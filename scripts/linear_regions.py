"""Linear regions of small ReLU networks with and without permutations, beside PA-DST's bound.

Writes results/tables/linear_regions.csv and results/figures/linear_regions.png; a minute on a CPU.
"""

import csv
import math
import statistics
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from padst_exp.analysis.regions import bound, count_regions, random_net, sample_points
from padst_exp.engine.plots import BLUE, GREEN, GREY, ORANGE, STYLE
from padst_exp.seeds import stream

RESULTS = Path(__file__).parents[1] / "results"
WIDTH, DEPTH, POINTS, SEEDS = 8, 6, 500_000, 5
DIAGONALS = (torch.arange(WIDTH)[None] - torch.arange(WIDTH)[:, None]) % WIDTH
STRUCTURES = {
    "dense": (torch.ones(WIDTH, WIDTH, dtype=torch.bool), WIDTH),
    "block 2": (torch.block_diag(*[torch.ones(2, 2)] * (WIDTH // 2)).bool(), 2),
    "block 4": (torch.block_diag(*[torch.ones(4, 4)] * (WIDTH // 4)).bool(), 4),
    "2 diagonals": (DIAGONALS < 2, 2),
}
COLORS = {"dense": GREY, "block 2": BLUE, "block 4": GREEN, "2 diagonals": ORANGE}


def main() -> None:
    """Count, write, draw."""
    rows = []
    for name, (mask, rank) in STRUCTURES.items():
        for permuted in (False, True) if name != "dense" else (False,):
            counts = []
            for seed in range(SEEDS):
                net = random_net(mask, DEPTH, stream("regions", seed), permuted=permuted)
                points = sample_points(POINTS, WIDTH, stream("points", seed))
                counts.append(count_regions(net, points))
            bounds = bound(WIDTH, DEPTH, rank, permuted=permuted)
            for depth in range(DEPTH):
                found = [count[depth] for count in counts]
                rows.append(
                    {
                        "structure": name,
                        "permuted": permuted,
                        "layers": depth + 1,
                        "regions_mean": round(statistics.fmean(found)),
                        "regions_sd": round(statistics.stdev(found)),
                        "bound": f"{bounds[depth]:.6g}",
                        "width": WIDTH,
                        "points": POINTS,
                        "seeds": SEEDS,
                    }
                )
            print(name, permuted, [round(statistics.fmean(c)) for c in zip(*counts, strict=True)])
    (RESULTS / "tables").mkdir(parents=True, exist_ok=True)
    with open(RESULTS / "tables" / "linear_regions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, RESULTS / "figures" / "linear_regions.png")


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Counted regions and the bound, by layers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, key, title in (
            (axes[0], "regions_mean", f"Regions found by {POINTS:,} points (mean of {SEEDS})"),
            (axes[1], "bound", "PA-DST's bound"),
        ):
            for name, color in COLORS.items():
                for permuted, style in ((False, "-"), (True, (0, (4, 2)))):
                    mine = [r for r in rows if r["structure"] == name and r["permuted"] is permuted]
                    if mine:
                        label = f"{name}, permuted" if permuted else name
                        values = [float(str(row[key])) for row in mine]
                        axis.plot(
                            range(1, DEPTH + 1), values, color=color, ls=style, lw=1.6, label=label
                        )
            axis.set_yscale("log")
            axis.set_title(title)
            axis.set_xlabel("layers")
        limit = math.log10(POINTS)
        axes[0].axhline(10**limit, color=GREY, lw=0.8, ls=":")
        axes[0].legend(fontsize=8)
        figure.savefig(path)


if __name__ == "__main__":
    main()
