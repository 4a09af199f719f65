"""`python -m padst_exp.analyze` on a small run: numbers, pictures, mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from matplotlib.image import imread
from omegaconf import OmegaConf

from padst_exp.analysis.cost import count
from padst_exp.analyze import AnalyzeSchema, analyze, summary
from padst_exp.config import config_dir, read_keys, results_config
from padst_exp.engine.distributed import World
from padst_exp.engine.loop import run
from padst_exp.engine.run_directory import RunDirectory
from padst_exp.errors import UserError
from padst_exp.restore import restore_run
from padst_exp.train import build_experiment

PARTS = ["cost", "spectrum", "paths", "topology", "permutations"]


def trained(root: Path, *overrides: str) -> Path:
    """A run directory after 12 steps and three updates."""
    sizes = ("model.dim=32", "model.depth=2", "model.heads=2", "sparsity=0.6", "device=cpu")
    steps = ("trainer.steps=12", "trainer.eval_interval=6", "trainer.checkpoint_interval=3")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(
            "config",
            [*sizes, *steps, "logger=none", "trainer.keep_last=9", "backend=torch", *overrides],
        )
    world = World()
    directory = RunDirectory.open(
        root,
        "run",
        world,
        resume="never",
        config=results_config(cfg),
        config_text=OmegaConf.to_yaml(cfg, resolve=True),
        overrides=[],
    )
    run(build_experiment(cfg, world), directory, world)
    return directory.path


def keys(path: Path, **changes: Any) -> AnalyzeSchema:
    values = {
        "out": None,
        "parts": tuple(PARTS),
        "device": "cpu",
        "trust": (),
        "changes": (),
        **changes,
    }
    return AnalyzeSchema(run=str(path), **values)


def test_a_run_is_analysed_along_its_checkpoints(tmp_path: Path) -> None:
    path = trained(
        tmp_path, "structure=nm", "structure.group=8", "permutation=random", "dst.interval=3"
    )
    folder, results = analyze(keys(path), World())
    assert folder == path / "analysis"
    assert results == json.loads((folder / "analysis.json").read_text())
    assert {file.name for file in folder.iterdir()} == {
        "analysis.json", *(f"{part}.png" for part in PARTS),
    }  # fmt: skip
    for part in PARTS:
        picture = imread(folder / f"{part}.png")
        assert picture.std() > 0.02, f"{part}.png is empty"

    steps = [row["step"] for row in results["spectrum"]]
    assert steps == [0, 3, 6, 9, 12] == [row["step"] for row in results["paths"]]
    restored = restore_run(path, World())
    cost = results["cost"]
    assert cost["flops"] == count(restored.model, torch.zeros(1, 1, 8, 8)).flops
    assert set(cost["kinds"]) == {
        "sparse", "product", "head", "attention", "norm", "activation", "other",
    }  # fmt: skip
    assert sum(flops for flops, _ in cost["kinds"].values()) == cost["flops"]
    assert cost["flops"] < cost["dense"]["flops"]
    assert cost["kinds"]["sparse"][0] == pytest.approx(
        0.4 * (cost["dense"]["kinds"]["product"][0] - cost["kinds"]["product"][0]), rel=0.02
    )

    topology = results["topology"]
    assert [row["step"] for row in topology["changes"]] == [3, 6]
    assert all(0 < row["churn"] <= 0.3 for row in topology["changes"])
    means = [sum(row["explored"].values()) / len(row["explored"]) for row in topology["explored"]]
    assert means[0] == pytest.approx(0.4, abs=0.02)
    assert means == sorted(means) and means[0] < means[1] < means[2] == means[-1] < 1
    final = json.loads((path / "summary.json").read_text())
    assert means[-1] == pytest.approx(final["topology"]["explored"])

    last = results["permutations"][-1]
    assert last["distance"] == final["permutations"]["distance_to_identity"]
    assert set(last["moved_since_start"].values()) == {0.0}, "random permutations stay"
    names = results["paths"][-1]["layers"]
    assert names[:3] == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1"]
    assert len(names) == len(results["paths"][-1]["random"]) == 8
    lines = list(summary(results))
    assert len(lines) == 7 and "FLOPs" in lines[0] and "explored" in lines[5]

    again, only = analyze(keys(path, out=str(tmp_path / "other"), parts=("cost",)), World())
    assert set(only) == {"run", "step", "cost"} and (again / "cost.png").is_file()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    dense = trained(tmp_path, "structure=dense", "permutation=none", "dst=static")
    for path, message in (
        (tmp_path / "no", "run: "),
        (dense, "run: expected one with sparse layers"),
    ):
        with pytest.raises(UserError, match=f"^{message}[^\n]*$"):
            analyze(keys(path), World())
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("analyze", ["run=x", "parts=[cost,graphs]"])
    with pytest.raises(UserError, match=r"^parts: expected [^\n]*cost or spectrum[^\n]*$"):
        read_keys(cfg, AnalyzeSchema)
