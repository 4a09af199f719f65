"""The YAML files: each is one strict constructor call, all of them compose with each other."""

import fnmatch
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import padst_kernels
from from_yaml import from_yaml, leaf
from padst_exp import config, identity
from padst_exp.config import GROUPS, build, config_dir, config_hash, options
from padst_exp.engine.distributed import World
from padst_exp.errors import UserError
from padst_exp.targets import keyword_parameters
from padst_exp.train import Run, build_task, run_settings

Compose = Callable[..., DictConfig]

FILES = sorted(path for path in config_dir().rglob("*.yaml") if "hydra" not in path.parts)
LEAVES = [f"{group}/{option}" for group in GROUPS for option in options(group)]

# What each data set gives its model; a new one needs a line here.
SHAPES: dict[str, dict[str, object]] = {
    "digits": {"image_size": 8, "channels": 1, "num_classes": 10},
    "fashion_mnist": {"image_size": 28, "channels": 1, "num_classes": 10},
    "cifar10": {"image_size": 32, "channels": 3, "num_classes": 10},
    "cifar100": {"image_size": 32, "channels": 3, "num_classes": 100},
    "imagenet1k": {"image_size": 224, "channels": 3, "num_classes": 1000},
    "image_folder": {"image_size": 32, "channels": 3, "num_classes": 10},
    "synthetic_images": {"image_size": 224, "channels": 3, "num_classes": 1000},
    "shakespeare": {"vocab_size": 512, "context_length": 64},
    "text_file": {"vocab_size": 1024, "context_length": 128},
    "wikitext103": {"vocab_size": 50257, "context_length": 1024},
    "c4": {"vocab_size": 50257, "context_length": 1024},
    "synthetic_tokens": {"vocab_size": 50257, "context_length": 1024},
}


NO_FIT = r"^model: \S+ does not fit the data set, which gives [^\n]+; it has no [^\n]+$"


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield lambda *overrides: hydra.compose("config", list(overrides))


def calls(path: str) -> Iterator[tuple[str, DictConfig, dict[str, Any]]]:
    """Every constructor call in a leaf: its key, its node, and the parameters that are its own."""
    group = path.partition("/")[0]
    nodes = [(group, leaf(path))]
    while nodes:
        key, node = nodes.pop()
        parameters = keyword_parameters(config.resolve_target(node, key))
        if group == "model":
            shape = next(shape for shape in SHAPES.values() if set(shape) <= set(parameters))
            parameters = {name: parameters[name] for name in parameters if name not in shape}
        yield key, node, parameters
        for name in node:
            inner = None if OmegaConf.is_missing(node, name) else node[name]
            if isinstance(inner, DictConfig) and "_target_" in inner:
                nodes.append((f"{key}.{name}", inner))


def test_every_model_meets_every_data_set(compose: Compose) -> None:
    assert set(SHAPES) == set(options("dataset"))
    kinds: dict[str, Any] = {
        name: config.resolve_target(leaf(f"dataset/{name}"), "dataset") for name in SHAPES
    }
    for model in options("model"):
        takes = keyword_parameters(config.resolve_target(leaf(f"model/{model}"), "model"))
        for dataset, shape in SHAPES.items():
            assert set(kinds[dataset].gives) == set(shape)
            if not set(shape) <= set(takes):
                with pytest.raises(UserError, match=NO_FIT):
                    build(leaf(f"model/{model}"), "model", shape)
                continue
            cfg = compose(f"model={model}", f"dataset={dataset}")
            run_settings(cfg)
            if "depth" in cfg.model:
                cfg.model.depth = 2  # as many tell as well
            with torch.device("meta"):
                names = [name for name, _ in build(cfg.model, "model", shape).named_modules()]
            for rule in cfg.sparse:
                assert fnmatch.filter(names, rule.pattern)
            assert build(cfg.optimizer, "optimizer").lr < 1
            assert build(cfg.trainer, "trainer").total_steps(100_000) >= 100


def test_what_does_not_fit_is_told_before_data_is_read(compose: Compose) -> None:
    for choices in (("model=gpt2", "dataset=imagenet1k"), ("model=vit", "dataset=text_file")):
        with pytest.raises(UserError, match=NO_FIT):
            build_task(compose(*choices), World())


def test_recipes_are_told_by_their_data_sets(compose: Compose) -> None:
    demo = compose("model=vit")
    assert demo.dataset._target_.endswith("Digits")
    assert (demo.model.dim, demo.model.patch_size, demo.trainer.steps) == (128, 4, 1000)
    fashion = compose("model=vit", "dataset=fashion_mnist")
    assert fashion.model == demo.model and fashion.trainer == demo.trainer
    paper = compose("model=vit", "dataset=imagenet1k")
    assert (paper.model.dim, paper.model.drop_path, paper.trainer.epochs) == (768, 0.1, 300)
    small = compose("model=vit", "dataset=imagenet1k", "recipe=demo")
    assert small.model == demo.model and small.trainer == demo.trainer
    assert small.dataset == paper.dataset
    text = compose("model=gpt2")
    assert text.dataset._target_.endswith("Shakespeare") and text.model.dim == 128
    assert compose("model=mixer", "dataset=imagenet1k").optimizer.weight_decay == 0.1


def test_parts_of_files_belong_to_models_or_scales() -> None:
    # A part under another name would be skipped in silence.
    parts = [path for path in FILES if path.parent.name[0] == "_"]
    assert len(parts) > 10
    for path in parts:
        group = "scale" if "experiment" in path.parts else "model"
        assert path.stem in options(group)
        users = [other.read_text() for other in path.parents[1].rglob("*.yaml")]
        assert any(f"{path.parent.name}: ${{{group}}}" in text for text in users)


def test_recipes_experiments_and_debugging_compose(compose: Compose) -> None:
    for group in ("recipe", "experiment", "debug"):
        for option in options(group):
            cfg = compose(f"{group}={option}")
            run_settings(cfg)
            assert build(cfg.trainer, "trainer").total_steps(100_000) > 0
    quick = compose("debug=quick", "dataset=imagenet1k")
    assert build(quick.trainer, "trainer").total_steps(2000) == 8
    assert quick.logger._target_.endswith("NoLogger")


def test_keys_are_exactly_the_parameters_and_no_default_stands_twice() -> None:
    for path in LEAVES:
        for key, node, parameters in calls(path):
            given = {str(name) for name in node if name != "_target_"}
            assert given == set(parameters), f"{path}: {key}"
            twice = [name for name, value in parameters.items() if value.default is not value.empty]
            assert not twice, f"{path}: {key} has defaults in Python too: {twice}"


def test_mistakes_in_a_leaf_name_their_key() -> None:
    for path in LEAVES:
        for key, node, parameters in calls(path):
            present = {n: "x" if OmegaConf.is_missing(node, n) else node[n] for n in node}
            wrong = {name: {"no parameter": "is a mapping"} for name in parameters}
            for name, value in {**wrong, "spede": 1}.items():
                with pytest.raises(UserError) as error:
                    build(OmegaConf.create({**present, name: value}), key)
                what = "unknown key; " if name == "spede" else "expected "
                assert str(error.value).startswith(f"{key}.{name}: {what}")
                assert "\n" not in str(error.value)


def test_leaves_without_files_of_the_user_build() -> None:
    for path in LEAVES:
        group, _, option = path.partition("/")
        if group in ("model", "dataset", "trainer"):
            continue
        assert from_yaml(path) is not None
    for option in ("digits", "shakespeare"):
        assert from_yaml(f"dataset/{option}").model_shape == SHAPES[option]
    for option in ("synthetic_images", "synthetic_tokens"):
        assert from_yaml(f"dataset/{option}", pool=1).model_shape == SHAPES[option]


def test_yaml_is_data() -> None:
    for path in FILES:
        resolvers = set(re.findall(r"\$\{([\w.]+):", path.read_text()))
        assert not resolvers, "only plain references: derived values are computed in Python"


def test_zero_is_a_seed(compose: Compose) -> None:
    assert run_settings(compose("seed=0")).seed == 0
    assert config_hash(compose("seed=0")) != config_hash(compose("seed=1"))


def test_run_keys_are_checked(compose: Compose) -> None:
    cfg = compose()
    cases: list[tuple[str, object, str]] = [
        ("sparsity", 1, "sparsity: expected a number in [0, 1), got 1.0"),
        ("sparsity", -0.1, "sparsity: expected a number in [0, 1), got -0.1"),
        ("sparsity", float("nan"), "sparsity: expected a finite number of at most 1e30, got "),
        ("sparsity", "abc", "sparsity: expected float, got 'abc'"),
        ("distribution", "erd", "distribution: expected uniform or erk or dict[str, float], got "),
        ("distribution", {"a": 2}, "distribution.a: expected a number in [0, 1), got 2"),
        ("distribution", {"a": True}, "distribution: expected uniform or erk or dict[str, float]"),
        ("low_rank", -1, "low_rank: expected a rank, or 0 for none, got -1"),
        ("low_rank", 0.5, "low_rank: expected int, got 0.5"),
        ("storage", "dense", "storage: expected packed or masked, got 'dense'"),
        ("resume", "yes", "resume: expected never or auto, got 'yes'"),
        ("device", "tpu", "device: expected auto or cpu or cuda, got 'tpu'"),
        ("backend", "dense", "backend: expected auto or native or torch or triton or cuda or "),
        ("seed", -1, "seed: expected an integer from 0 to 2^63 - 1, got -1"),
        ("seed", 1.5, "seed: expected int, got 1.5"),
        ("seed", None, "seed: expected int, got None"),
        ("name", "a/b", "name: expected the name of one folder, of at most 200 bytes"),
        ("sparse", [{"pattern": "a", "split": 0}], "sparse[0].split: expected at least 1, got 0"),
        ("sparse", [{"split": 1}], "sparse: expected tuple[{pattern: str, split: int}, ...], got "),
        ("sparse", [{"pattern": "a", "split": 1, "x": 1}], "sparse: expected tuple["),
        ("sprase", [], "sprase: unknown key; did you mean sparse?"),
        ("structure", 3, "structure: missing, expected a mapping with a _target_"),
    ]
    for key, value, message in cases:
        with pytest.raises(UserError) as error:
            run_settings(OmegaConf.create({**cfg, key: value}))
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


def test_backends_are_those_of_the_kernels() -> None:
    choices = get_args(keyword_parameters(Run)["backend"].annotation)
    assert choices == ("auto", *get_args(padst_kernels.Backend))


def test_a_saved_config_gives_the_same_run(compose: Compose, tmp_path: Any) -> None:
    cfg = compose("distribution={a: 0.5}", "seed=3")
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    loaded = OmegaConf.load(tmp_path / "config.yaml")
    assert isinstance(loaded, DictConfig)
    assert run_settings(loaded) == run_settings(cfg)
    assert config_hash(loaded) == config_hash(cfg)


def test_the_name_tells_choices_and_results(compose: Compose) -> None:
    choices = {"model": "vit", "structure": "nm", "dst": "rigl", "permutation": "none"}
    cfg = compose()
    name = config.run_name(cfg, choices)
    assert re.fullmatch(r"vit-nm-rigl-none-s0\.9-seed0-[0-9a-f]{8}", name)
    same = {"runs": "elsewhere", "resume": "auto", "logger.mode": "online", "device": "cpu"}
    other = {"trainer.batch_size": 7, "dst.fraction": 0.2, "storage": "masked"}
    for key, value in (same | other).items():
        changed = cfg.copy()
        OmegaConf.update(changed, key, value)
        assert (config.run_name(changed, choices) == name) == (key in same)
    assert config.run_name(compose("name=mine"), choices) == "mine"


def test_a_name_does_not_tell_what_changes_no_weight_or_how_a_path_is_spelt(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = {"model": "vit", "structure": "nm", "dst": "rigl", "permutation": "none"}
    for name in ("data", "others"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("data")
    cfg = compose("dataset=imagenet1k", f"dataset.root={tmp_path}/data")
    name = config.run_name(cfg, choices)
    for key in identity.FREE | identity.LOCATIONS:
        group = key.partition(".")[0]
        known = group in cfg and (group == key or isinstance(cfg[group], DictConfig))
        assert known, key
    same = [*((key, 77) for key in identity.FREE if key.startswith("trainer."))]
    same += [("dataset.root", path) for path in ("data", "data/", "./others/../data", "link")]
    other = [("dataset.root", "others"), ("dataset.root", "elsewhere"), ("trainer.epochs", 7)]
    for key, value in same + other:
        changed = cfg.copy()
        OmegaConf.update(changed, key, value)
        assert (config.run_name(changed, choices) == name) == ((key, value) in same), key
