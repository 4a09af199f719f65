"""Every structure once per kind of geometry. A new structure adds its line here and is tested."""

from padst_exp.structures import (
    NM,
    Block,
    Butterfly,
    Diagonal,
    FanIn,
    ShuffledBlock,
    Structure,
    Unstructured,
)

STRUCTURES: dict[str, Structure] = {
    "unstructured": Unstructured(),
    "block-8": Block(size=8, balanced=False),
    "block-8-balanced": Block(size=8, balanced=True),
    "block-4": Block(size=4, balanced=False),
    "nm-1": NM(n=1, m=None, group=1),
    "nm-16": NM(n=2, m=None, group=16),
    "fan-in-1": FanIn(group=1),
    "fan-in-16": FanIn(group=16),
    "butterfly": Butterfly(size=8),
    "shuffled-block": ShuffledBlock(size=8),
    "diag": Diagonal(bundle=1, stride=16, width=16),
    "diag-band": Diagonal(bundle="band", stride=16, width=5),
    "diag-stride": Diagonal(bundle="stride", stride=8, width=16),
}


def shapes(name: str) -> list[tuple[int, int]]:
    """Square, rectangular both ways, and odd both ways; strides need a common divisor."""
    odd = [] if name == "diag-stride" else [(67, 41), (41, 67)]
    return [(64, 64), (96, 64), (64, 96), *odd]
