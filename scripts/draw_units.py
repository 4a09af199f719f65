"""Draw docs/units.png, the picture of docs/glossary.md: pools, units, frames and tiles.

python scripts/draw_units.py
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

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
# Pale colours of pools; active units, and one of them.
COLOURS = ListedColormap(["#dbe7f3", "#f5e2d0", "#dcefdc", "#efdcec", "#33506e", "#c0392b"])


def main() -> None:
    """Draw one panel for each structure."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (title, structure) in zip(axes, PANELS.items(), strict=True):
        geometry = structure.geometry(*SHAPE, DENSITY)
        counts = structure.initial_counts(geometry, DENSITY)
        draw(axis, geometry, draw_topology(geometry, counts, torch.Generator().manual_seed(3)))
        axis.set_title(title, fontsize=11)
    figure.savefig(Path(__file__).parents[1] / "docs" / "units.png", dpi=110)


def draw(axis: Axes, geometry: Geometry, active: torch.Tensor) -> None:
    """Pools in pale colours, active units dark, one of them red."""
    units = geometry.unit_ids()
    colours = torch.zeros(geometry.shape).flatten()
    colours[geometry.entries(units)] = (units // geometry.pool_size % 4).float()[:, None]
    colours[geometry.entries(active)] = 4.0
    colours[geometry.entries(active)[1]] = 5.0
    image = colours.view(geometry.shape).flip(0)
    axis.pcolormesh(image, cmap=COLOURS, vmin=0, vmax=5, edgecolors="white", linewidth=0.3)
    axis.set(aspect="equal", xticks=[], yticks=[])
    tiling, pools = geometry.tiling(), geometry.num_pools
    tiles = "entries one by one"
    if tiling is not None:
        tiles = f"tiles of {tiling.height} rows" + (", merged" if tiling.ascending else "")
    most = int(geometry.candidates.max())
    axis.set_xlabel(f"{pools} pool{'s' * (pools > 1)} of {most} units; {tiles}")


if __name__ == "__main__":
    main()
