from pathlib import Path

import hydra
import pytest

from padst_exp.bench import accuracy
from padst_exp.bench.accuracy import NOT_MEASURED, Accuracies
from padst_exp.bench.configurations import (
    LAYER_STRUCTURES,
    MODELS,
    Shape,
    describe,
    models,
    shapes,
    structure,
)
from padst_exp.config import build, config_dir
from padst_exp.errors import UserError


def test_names_and_what_tables_call_them() -> None:
    assert [describe(structure(name)) for name in LAYER_STRUCTURES] == [
        "nm group=64", "nm group=32", "nm group=16", "nm group=1", "block size=64",
        "block size=32", "block size=16", "diag stride=32", "diag bundle=1", "unstructured",
    ]  # fmt: skip
    assert describe(structure("diag-band-16")) == "diag band=16"


@pytest.mark.parametrize("name", ["nm", "nm-0", "nm-x", "diag-2", "mn-16", ""])
def test_unknown_structures_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"structures: .*nm-64"):
        structure(name)


def test_shapes_of_models_and_single_ones() -> None:
    assert shapes(["vit_b", "gpt2"]) == shapes(["vit_b"])
    assert Shape(1600, 4800, split=3) in shapes(["gpt2_xl"])
    assert str(shapes(["3072x768"])[0]) == "768->3072"
    with pytest.raises(UserError, match="did you mean vit_b"):
        shapes(["vit_bb"])
    with pytest.raises(UserError, match="did you mean vit"):
        models(["vitt"])


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_models_have_the_layers_that_are_timed(name: str) -> None:
    cfg = MODELS[name].config().model
    width = {"vit": "vit_b", "gpt2": "gpt2"}[name]
    assert {shape.in_features for shape in shapes([width])} == {cfg.dim, 4 * cfg.dim}
    assert [rule.split for rule in MODELS[name].rules("all")] == [3, 1, 1, 1]
    assert [rule.split for rule in MODELS[name].rules("dense_qkv")] == [1, 1, 1]


def test_accuracy_is_looked_up_by_configuration(tmp_path: Path) -> None:
    (tmp_path / "demo_accuracy.csv").write_text(
        "dataset,seed,model,metric,value\n"
        "digits,0,demo,top1,97\ndigits,1,demo,top1,98\ndigits,0,zeroed,top1,10\n"
        "shakespeare,0,demo,perplexity,30\ndigits,2,demo,top1,\n"
    )
    (tmp_path / "structures.csv").write_text(
        "dataset,model,structure,density,permutation,seed,metric,value\n"
        "fashion_mnist,vit,block size=32,0.0972,DoublyStochastic,0,top1,80.04\n"
        "fashion_mnist,vit,unstructured,0.1,NoPermutation,0,top1,84.1\n"
        # A run that the demos' table has too.
        "digits,vit,nm group=16,0.1009,DoublyStochastic,1,top1,98\n"
    )
    (tmp_path / "framework.csv").write_text("what,ratio\nmemory,0.1\n")
    found = Accuracies(tmp_path)
    assert found.of("nm group=16", 0.1, "all") == (
        "97.5% top-1 on digits (demo, learned permutations, 2 seeds)"
    )
    assert found.of("block size=16", 0.2, "all") == (
        "30.0 perplexity on shakespeare (demo, learned permutations, 1 seed)"
    )
    assert found.of("unstructured", 0.1, "all") == "84.1% top-1 on fashion_mnist (demo, 1 seed)"
    assert found.of("block size=32", 0.1, "all").startswith("80.0% top-1 on fashion_mnist")
    for other in (
        ("nm group=16", 0.05, "all"),
        ("nm group=16", 0.1, "dense_qkv"),
        ("nm group=64", 0.1, "all"),
    ):
        assert found.of(*other) == NOT_MEASURED
    assert Accuracies(tmp_path / "none").of("nm group=16", 0.1, "all") == NOT_MEASURED


@pytest.mark.parametrize(
    ("dataset", "overrides"),
    [
        ("digits", []),
        ("fashion_mnist", ["dataset=fashion_mnist"]),
        ("shakespeare", ["model=gpt2", "structure=block", "sparsity=0.8"]),
    ],
)
def test_the_demos_train_what_the_lookup_says(dataset: str, overrides: list[str]) -> None:
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose("config", overrides)
    trained = describe(build(cfg.structure, "structure")), round(1 - cfg.sparsity, 6)
    assert accuracy.DEMOS[dataset] == trained
