"""FLOPs of every transform at model level: results/tables/iso_flop.csv. Minutes on a CPU.

Nothing is trained and no weight is stored: models live on the meta device.
"""

import csv
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from padst_exp.analysis.cost import sparse_ift_flops
from padst_exp.config import build, config_dir
from padst_exp.errors import UserError
from padst_exp.sparsify import Rule
from padst_exp.transforms import Original, example

TABLE = Path(__file__).parents[1] / "results" / "tables" / "iso_flop.csv"
CIFAR = {"image_size": 32, "channels": 3, "num_classes": 100}
IMAGENET = {"image_size": 224, "channels": 3, "num_classes": 1000}
TEXT = {"vocab_size": 50257, "context_length": 1024}
MODELS: dict[tuple[str, str], tuple[dict[str, Any], dict[str, int]]] = {
    ("resnet18", "cifar100"): ({"stem": "cifar"}, CIFAR),
    ("resnet18", "imagenet1k"): ({}, IMAGENET),
    ("resnet34", "imagenet1k"): ({}, IMAGENET),
    ("resnet50", "imagenet1k"): ({}, IMAGENET),
    ("mobilenet_v2", "cifar100"): ({"stem": "cifar"}, CIFAR),
    ("vit", "imagenet1k"): ({}, IMAGENET),
    ("gpt3_small", "wikitext103"): ({}, TEXT),
}
TRANSFORMS = ("sparse_wide", "sparse_parallel", "sparse_factorized", "sparse_doped")
SPARSITIES = (0.5, 0.75, 0.9)


def main() -> None:
    """Count every model under every transform."""
    rows = []
    for (name, data), (changes, shape) in MODELS.items():
        start = original(name, changes, shape)
        for transform in TRANSFORMS:
            for nonlinearity in ("",) if transform == "sparse_wide" else ("paper", "code"):
                for sparsity in SPARSITIES:
                    row = {
                        "model": name,
                        "data": data,
                        "transform": transform,
                        "nonlinearity": nonlinearity,
                        "sparsity": sparsity,
                        **measured(start, transform, nonlinearity, sparsity, data),
                    }
                    rows.append(row)
                    print(*row.values())
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with open(TABLE, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], restval="")
        writer.writeheader()
        writer.writerows(rows)


def original(name: str, changes: dict[str, Any], shape: dict[str, int]) -> Original:
    """A model of conf/ as transforms take it, on the meta device."""
    tree = OmegaConf.load(config_dir() / "model" / f"{name}.yaml")
    keys = {**tree.model, **changes}

    def dense(more: Any) -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = build(OmegaConf.create({**keys, **more}), "model", shape)
        return model

    return Original(
        build=dense,
        keys={key: value for key, value in keys.items() if key != "_target_"},
        rules=[Rule(rule.pattern, rule.split) for rule in tree.sparse],
        inputs=example(shape).to("meta"),
    )


def measured(
    start: Original, name: str, nonlinearity: str, sparsity: float, data: str
) -> dict[str, Any]:
    """One row; a budget that cannot be met leaves a note instead of a sparsity."""
    node = OmegaConf.load(config_dir() / "transform" / f"{name}.yaml")
    if nonlinearity:
        node.nonlinearity = nonlinearity
    empty = dict.fromkeys(COLUMNS, "")
    try:
        transformed = build(node, "transform")(start, sparsity, "uniform")
        note = ""
    except UserError as error:
        node.scope, note = "layers", str(error)
        transformed = build(node, "transform")(start, sparsity, "uniform")
    baseline = transformed.baseline
    flops = baseline.flops
    asked = flops.now(dict.fromkeys(flops.weights, 1 - sparsity))
    row = {
        **empty,
        "flops_dense": flops.dense,
        "over_dense_as_asked": f"{asked / flops.dense:.4f}",
        "note": note,
    }
    if note:
        return row
    now = flops.now(dict.fromkeys(flops.weights, transformed.density))
    row |= {
        "sparsity_solved": f"{1 - transformed.density:.4f}",
        "flops": round(now),
        "over_dense": f"{now / flops.dense:.4f}",
    }
    if name == "sparse_wide" and start.inputs.dim() == 4:
        skip = ("*act*", "global_pool*") if data == "cifar100" else ("*act*",)
        layers = {weight.rpartition(".weights.")[0] for weight in flops.weights}
        theirs = sparse_ift_flops(start.build({}), start.inputs, skip=skip)
        density = dict.fromkeys(layers, transformed.density)
        after = sparse_ift_flops(transformed.model, start.inputs, density, skip=skip)
        row |= {"flops_dense_sparse_ift": theirs, "over_dense_sparse_ift": f"{after / theirs:.4f}"}
    return row


COLUMNS = (
    "flops_dense",
    "over_dense_as_asked",
    "sparsity_solved",
    "flops",
    "over_dense",
    "flops_dense_sparse_ift",
    "over_dense_sparse_ift",
    "note",
)

if __name__ == "__main__":
    main()
