"""Exported models: loading them, measuring what is fastest, running them.

model = load("runs/mine/export", device="cuda", dtype=torch.bfloat16)
print(tune(model, images))          # measured: sparse or dense, layer by layer; in which form
model = torch.compile(model)
logits = model(images)

For small batches on a GPU, where launches take most of the time, capture the whole model instead:

print(tune(model, images, captured=True))
model = graphed(model, images)

A model that was trained in a loop of your own is written by `save(model, path)` and comes back by
`load(path, model=...)`, with a dense model like it.

`load` measures nothing and gives packed layers in plain PyTorch, faster than dense or not: tune.
"""

from padst_exp.inference.graphs import graphed
from padst_exp.inference.linear import PackedConv2d, PackedLinear
from padst_exp.inference.loading import load
from padst_exp.inference.packing import harden, pack, save
from padst_exp.inference.tuning import TuningReport, tune
from padst_exp.inference.weights import PackedEntries, PackedTiles

__all__ = [
    "PackedConv2d",
    "PackedEntries",
    "PackedLinear",
    "PackedTiles",
    "TuningReport",
    "graphed",
    "harden",
    "load",
    "pack",
    "save",
    "tune",
]
