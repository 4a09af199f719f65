"""What is added from outside the package goes in with one class, one YAML file, one test line.

`--config-dir` names the folder of YAML files; `_target_` finds the classes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from extensions.own import Arrow
from layers.layer_cases import LIVES, linear, sparse_layer
from layers.reference import assert_close, expected, run
from padst_exp.engine.distributed import World
from padst_exp.engine.records import read_metrics
from padst_exp.errors import UserError
from padst_exp.restore import restore_run
from padst_exp.train import main

Train = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains a few steps of a small ViT unless told otherwise; its summary and metrics."""
    for split in ("train", "val"):
        for label in range(2):
            folder = tmp_path / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(8):
                colour = (255 * label, 30 * number, 100)
                Image.new("RGB", (40, 36), colour).save(folder / f"{number}.png")

    def started(*overrides: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        own = ["padst-train", "--config-dir", str(Path(__file__).with_name("conf"))]
        small = ["model.depth=1", "model.dim=32", "model.heads=2"]
        small = [] if any("model=" in override for override in overrides) else small
        run = ["logger=none", f"runs={tmp_path}/runs", "name=own", "backend=native"]
        steps = ["trainer.steps=6", "trainer.batch_size=16", "trainer.eval_interval=6"]
        run += ["sparsity=0.5", *steps, *small]
        monkeypatch.setattr(sys, "argv", [*own, *run, *overrides])
        main()
        folder = tmp_path / "runs" / "own"
        return json.loads((folder / "summary.json").read_text()), read_metrics(
            folder / "metrics.jsonl"
        )

    return started


def kinds(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def test_an_own_structure_trains(train: Train, tmp_path: Path) -> None:
    summary, rows = train("structure=arrow", "dst.interval=2")
    assert summary["sparsification"]["structure"] == "Arrow"
    assert summary["density_of_layers"] == pytest.approx(0.5, abs=0.07)
    assert len(kinds(rows, "rewire")) == 2 and summary["topology"]["units_replaced"] > 0
    # In a stored config it is anybody's, until the user vouches for it.
    with pytest.raises(UserError, match=r"got 'extensions\.own\.Arrow'; trust=extensions runs it"):
        restore_run(tmp_path / "runs" / "own", World())
    trusted = restore_run(tmp_path / "runs" / "own", World(), trust="extensions")
    assert trusted.report.density("layers") == summary["density_of_layers"]


def test_an_own_score_trains(train: Train) -> None:
    _, rows = train("dst=own_score")
    assert sum(row["replaced"] for row in kinds(rows, "rewire")) > 0


def test_an_own_permutation_learner_trains_and_hardens(train: Train) -> None:
    summary, rows = train("permutation=own_learner")
    hardened = kinds(rows, "harden")
    assert {row["of"] for row in hardened} == {"permutation"}
    assert summary["permutations"]["still_soft"] == [] and len(hardened) == 10
    for row in hardened:
        # The penalty is that of the soft matrix; what multiplied was hard before.
        assert row["penalty"] > 0.1
        assert row["loss_after"] == pytest.approx(row["loss_before"], abs=1e-5)


def test_own_images_train_a_resnet_with_sparse_3x3_convolutions(
    train: Train, tmp_path: Path
) -> None:
    summary, rows = train(
        "model=own_resnet", "dataset=own_images", f"dataset.root={tmp_path}/images",
        "structure=unstructured", "dst.interval=4", "permutation=none", "sparsity=0.9",
        "trainer.batch_size=8",
    )  # fmt: skip
    layers = summary["sparsification"]["layers"]
    assert len(layers) == 16 and all(layer["shape"][1] % 9 == 0 for layer in layers)
    assert summary["density_of_layers"] == pytest.approx(0.1, abs=1e-3)
    assert len(kinds(rows, "rewire")) == 1


def test_an_own_structure_is_right_in_every_gradient() -> None:
    structure = Arrow(size=8)
    for shape in ((64, 64), (96, 64), (64, 96)):
        for life in LIVES:
            for storage in ("packed", "masked"):
                layer = sparse_layer(
                    linear(shape, 2), structure, life=life, storage=storage, split=2
                )
                x, dy = torch.randn(5, shape[1]), torch.randn(5, 2 * shape[0])
                wanted = expected(layer, x, dy)
                for backend in layer.backends(torch.device("cpu")):
                    layer.use_backend(backend)
                    assert_close(run(layer, x, dy), wanted, f"{shape} {life} {storage} {backend}")
