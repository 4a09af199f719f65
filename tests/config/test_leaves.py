"""Every YAML file of every group composes, builds, and refuses misspelt keys and wrong types."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from padst_exp import config
from padst_exp.config import build, config_dir, config_hash, register_schemas, run_settings
from padst_exp.errors import UserError

FILES = sorted(path for path in config_dir().rglob("*.yaml") if "hydra" not in path.parts)
LEAVES = [path for path in FILES if path.parent != config_dir()]
SHAPES: tuple[dict[str, object], ...] = (
    {"image_size": 48, "channels": 1, "num_classes": 3},
    {"vocab_size": 7, "context_length": 8},
)


def leaf_id(path: Path) -> str:
    return f"{path.parent.name}={path.stem}"


def composed(*overrides: str) -> DictConfig:
    register_schemas()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def calls(node: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    """All nodes below `node` that have a `_target_`, with their dotted keys."""
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            yield key, node
        for name in node:
            if not OmegaConf.is_missing(node, name):
                yield from calls(node[name], f"{key}.{name}")


def own_call(path: Path) -> DictConfig:
    """The constructor call that a file makes, without the rest of the config; {} if none."""
    tree = OmegaConf.load(path)
    node = tree if "_target_" in tree else tree.get(path.parent.name) or {}
    return OmegaConf.create(OmegaConf.to_container(node) if "_target_" in node else {})


CALLS = [path for path in LEAVES if own_call(path)]


@cache
def demo_for(model: str) -> str:
    """A data set that makes the model small: its own, or that of a model built alike."""
    folder = config_dir()
    target = OmegaConf.load(folder / "model" / f"{model}.yaml").model._target_
    alike = [
        path.stem
        for path in sorted((folder / "model").glob("*.yaml"))
        if OmegaConf.load(path).model._target_ == target
    ]
    for candidate in [model, *alike]:
        if (folder / "dataset" / f"demo_for_{candidate}.yaml").is_file():
            return f"demo_for_{candidate}"
    raise AssertionError(f"no small data set for model={model}")


def shape_for(node: DictConfig) -> dict[str, object]:
    parameters = config.keyword_parameters(config.resolve_target(node, "model"))
    return next(shape for shape in SHAPES if set(shape) <= set(parameters))


@pytest.mark.parametrize("path", LEAVES, ids=leaf_id)
def test_every_leaf_composes_and_builds(path: Path) -> None:
    group, option = path.parent.name, path.stem
    overrides = [f"{group}={option}"]
    if group == "model":
        overrides.append(f"dataset={demo_for(option)}")
    elif option.startswith("demo_for_"):
        overrides.append(f"model={option.removeprefix('demo_for_')}")
    cfg = composed(*overrides)
    run_settings(cfg)
    node = cfg[group]
    if group == "dataset":
        try:
            task = build(node, group)
        except UserError as error:
            # These are not on every machine, and say in one line how to get them.
            assert option in {
                "c4", "cifar100", "fashion_mnist", "imagenet1k", "text_file", "wikitext103",
            }  # fmt: skip
            assert "\n" not in str(error)
            assert str(error).startswith("dataset.")
            return
        assert task.model_shape.keys() in [shape.keys() for shape in SHAPES]
        if option.startswith("demo_for_"):
            assert build(cfg.model, "model", task.model_shape).training
            assert build(cfg.trainer, "trainer").total_steps(len(task.train)) > 0
    elif group == "model":
        assert build(node, group, shape_for(node)).training
    elif group == "trainer":
        assert build(node, group).total_steps(1000) > 0
    else:
        assert build(node, group) is not None


@pytest.mark.parametrize("path", CALLS, ids=leaf_id)
def test_keys_are_exactly_the_parameters(path: Path) -> None:
    for key, node in calls(own_call(path), path.parent.name):
        parameters = config.keyword_parameters(config.resolve_target(node, key))
        given = {str(name) for name in node if name != "_target_"}
        derived = set(shape_for(node)) if path.parent.name == "model" else set()
        assert given | derived == set(parameters)
        assert not given & derived


@pytest.mark.parametrize("path", CALLS, ids=leaf_id)
def test_misspelt_keys_fail_by_their_name(path: Path) -> None:
    group = path.parent.name
    node = own_call(path)
    node["spede"] = 1
    with pytest.raises(UserError, match=rf"^{group}\.spede: unknown key; [^\n]+$"):
        build(node, group)


@pytest.mark.parametrize("path", CALLS, ids=leaf_id)
def test_wrong_types_fail_by_their_name(path: Path) -> None:
    group = path.parent.name
    call = own_call(path)
    # Values that a file leaves to the command line would be reported first.
    present = {name: call[name] for name in call if not OmegaConf.is_missing(call, name)}
    for name in (str(name) for name in call if name != "_target_"):
        node = OmegaConf.create({**present, name: {"no parameter": "is a mapping"}})
        with pytest.raises(UserError, match=rf"^{group}\.{name}: expected [^\n]+, got [^\n]+$"):
            build(node, group, shape_for(node) if group == "model" else None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(config_dir())))
def test_yaml_is_data(path: Path) -> None:
    resolvers = set(re.findall(r"\$\{([\w.]+):", path.read_text()))
    assert not resolvers, "only plain references: derived values are computed in Python"


def test_defaults_compose_with_every_model_that_has_a_demo() -> None:
    for path in sorted((config_dir() / "dataset").glob("demo_for_*.yaml")):
        model = path.stem.removeprefix("demo_for_")
        assert (
            composed(f"model={model}").dataset
            == composed(f"model={model}", f"dataset={path.stem}").dataset
        )


def test_zero_is_a_seed() -> None:
    assert run_settings(composed("seed=0")).seed == 0
    assert config_hash(composed("seed=0")) != config_hash(composed("seed=1"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sparsity=1", "sparsity: expected a number in [0, 1), got 1.0"),
        ("sparsity=-0.1", "sparsity: expected a number in [0, 1), got -0.1"),
        ("sparsity=nan", "sparsity: expected a number in [0, 1), got nan"),
        ("distribution=erd", "distribution: expected uniform, erk or a mapping"),
        ("distribution={a: 2}", "distribution.a: expected a number in [0, 1), got 2"),
        ("distribution={a: true}", "distribution.a: expected a number in [0, 1), got True"),
        ("storage=dense", "storage: expected packed or masked, got 'dense'"),
        ("resume=yes_please", "resume: expected never or auto, got 'yes_please'"),
        ("device=tpu", "device: expected auto or cpu or cuda, got 'tpu'"),
        ("seed=-1", "seed: expected an integer from 0 to 2^63 - 1, got -1"),
        ("name=a/b", "name: expected the name of one folder, got 'a/b'"),
        ("sparse=[{pattern: a, split: 0}]", "sparse[0].split: expected at least 1, got 0"),
    ],
)
def test_run_keys_are_checked(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        run_settings(composed(override))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override", ["sparsity=abc", "seed=1.5", "seed=null", "sparse=[{split: x}]"]
)
def test_run_keys_are_typed_on_composition(override: str) -> None:
    with pytest.raises(HydraException):
        composed(override)


def test_a_saved_config_gives_the_same_run(tmp_path: Path) -> None:
    cfg = composed("distribution={a: 0.5}", "seed=3")
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    loaded = OmegaConf.load(tmp_path / "config.yaml")
    assert run_settings(loaded) == run_settings(cfg)
    assert config_hash(loaded) == config_hash(cfg)


def test_the_name_tells_choices_and_results() -> None:
    choices = {"model": "vit", "structure": "nm", "dst": "rigl", "permutation": "none"}
    name = config.run_name(composed(), choices)
    assert re.fullmatch(r"vit-nm-rigl-none-s0\.9-seed0-[0-9a-f]{8}", name)
    for same in ["runs=elsewhere", "resume=auto", "logger=none", "device=cpu"]:
        assert config.run_name(composed(same), choices) == name
    for other in ["trainer.batch_size=7", "dst.fraction=0.2", "storage=masked"]:
        assert config.run_name(composed(other), choices) != name
    assert config.run_name(composed("name=mine"), choices) == "mine"
