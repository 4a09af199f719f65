"""Draw docs/units.png, the picture of docs/glossary.md: pools, units, frames and tiles.

python scripts/draw_units.py
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from padst_exp.structures import NM, Block, Diagonal, Geometry, Structure, Unstructured
from padst_exp.structures import random_units as draw_topology

SHAPE = (24, 32)
DENSITY = 0.25
PANELS: dict[str, Structure] = {
    "nm, n=2, m=8, group=8": NM(n=2, m=8, group=8),
    "block, size=8, balanced": Block(size=8, balanced=True),
    "diag, bundle=1": Diagonal(bundle=1, stride=1, width=1),
    "unstructured": Unstructured(),
}
PALE = ListedColormap(["#dbe7f3", "#f5e2d0", "#dcefdc", "#efdcec"])


def main() -> None:
    """Draw one panel for each structure."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axis, (title, structure) in zip(
        figure.subplots(1, len(PANELS)), PANELS.items(), strict=True
    ):
        geometry = structure.geometry(*SHAPE, DENSITY)
        counts = structure.initial_counts(geometry, DENSITY)
        active = draw_topology(geometry, counts, torch.Generator().manual_seed(3))
        draw(axis, geometry, active)
        axis.set_title(title, fontsize=11)
    figure.savefig(Path(__file__).parents[1] / "docs" / "units.png", dpi=110)


def draw(axis: Axes, geometry: Geometry, active: torch.Tensor) -> None:
    """Pools in pale colours, active units dark, one unit framed in red."""
    num_rows, num_columns = geometry.shape
    pools = torch.zeros(num_rows * num_columns)
    units = geometry.unit_ids()
    entries = geometry.entries(units)
    pools[entries.flatten()] = (
        (units // geometry.pool_size % 4).float().repeat_interleave(entries.shape[1])
    )
    axis.imshow(pools.view(num_rows, num_columns), cmap=PALE, vmin=0, vmax=3)
    for number, unit in enumerate(geometry.entries(active)):
        for entry in unit.tolist():
            row, column = divmod(entry, num_columns)
            edge = "#c0392b" if number == 1 else "white"
            cell = Rectangle(
                (column - 0.5, row - 0.5),
                1,
                1,
                facecolor="#33506e",
                edgecolor=edge,
                linewidth=1.8 if number == 1 else 0.4,
                zorder=3 if number == 1 else 2,
            )
            axis.add_patch(cell)
    axis.set_xticks([])
    axis.set_yticks([])
    tiling, pools = geometry.tiling(), geometry.num_pools
    tiles = "entries one by one"
    if tiling is not None:
        tiles = f"tiles of {tiling.height} rows" + (", merged" if tiling.ascending else "")
    most = int(geometry.candidates.max())
    axis.set_xlabel(f"{pools} pool{'s' * (pools > 1)} of {most} units; {tiles}")


if __name__ == "__main__":
    main()
