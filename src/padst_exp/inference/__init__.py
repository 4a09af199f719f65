"""Exported models: loading them, measuring what is fastest, running them.

model = load("runs/mine/export", device="cuda", dtype=torch.bfloat16)
print(tune(model, images))          # measured: sparse or dense, layer by layer; which layout
model = torch.compile(model)
logits = model(images)

For small batches on a GPU, where launches take most of the time, capture the whole model instead:

print(tune(model, images, captured=True))
model = graphed(model, images)

`load` measures nothing and gives the packed layers as they are, faster than dense or not: tune.
"""

from padst_exp.inference.graphs import graphed
from padst_exp.inference.linear import CondensedLinear, PackedLinear, TiledLinear
from padst_exp.inference.loading import load
from padst_exp.inference.packing import pack
from padst_exp.inference.tuning import Report, tune

__all__ = [
    "CondensedLinear",
    "PackedLinear",
    "Report",
    "TiledLinear",
    "graphed",
    "load",
    "pack",
    "tune",
]
