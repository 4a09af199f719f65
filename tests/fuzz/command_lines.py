"""Command lines as nobody would type them on purpose, drawn from the config tree itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hypothesis import strategies as st
from omegaconf import DictConfig, ListConfig, OmegaConf

from padst_exp.config import GROUPS, config_dir, options

# Small sizes for every model, so that a draw costs little where it is accepted.
SMALL: Mapping[str, str] = {
    "dim": "16",
    "mlp_dim": "24",
    "depth": "1",
    "heads": "2",
    "depths": "[1,1,1,1]",
    "width": "0.125",
    "patch_size": "4",
    "dropout": "0.0",
}
QUICK = (
    "logger=none",
    "sparsity=0.5",
    "backend=torch",
    "trainer.steps=1",
    "trainer.epochs=null",
    "trainer.batch_size=4",
    "trainer.micro_batches=1",
    "trainer.eval_batch_size=360",
    "trainer.workers=0",
)
# What small models can be shown without a download.
DATA = {
    "images": ["dataset=digits"],
    "small images": ["dataset=synthetic_images", "dataset.image_size=32", "dataset.pool=8",
                     "dataset.validation_samples=8"],
    "text": ["dataset=synthetic_tokens", "dataset.vocab_size=32", "dataset.context_length=8",
             "dataset.pool=8", "dataset.validation_samples=8"],
}  # fmt: skip
KINDS = {"gpt": "text", "llama": "text", "resnet": "small images", "mobilenet": "small images"}

WILD = [
    *("null", "true", "false", "0", "1", "-1", "2", "3", "7", "64", "100", "1000000"),
    *("99999999999999999999", "9223372036854775807", "-9223372036854775808", "2147483648"),
    *("0.0", "0.5", "-0.5", "1.0", "2.5", "1e-30", "1e30", "1e308", "-1e308", "1e-320"),
    *("inf", "-inf", "nan", "NaN", "'1'", "'0.5'", "1_000", "0x10", "1e3", "01"),
    *("", "' '", "x", "-", ".", "..", "/", "~", "a/b", "../x", "'a b'", "'\t'", "'a\nb'"),
    *("'é'", "é", "日本", "'日本'", "'\u202e'", "'\udc80'", "'\x00'", "x" * 300, f"'{'y' * 5000}'"),
    *("???", "'???'", "${seed}", "${sparsity}", "${model}", "${trainer}", "${nowhere}", "${.}"),
    *("${trainer.steps}", "${name}", "${hydra:runtime.cwd}", "${oc.env:NOWHERE}", "${", "$"),
    *("[]", "[1]", "[1,2]", "[0.5,0.5]", "[a]", "[null]", "[[]]", "[[0.5,0.1]]", "[[0.5,0.1,3]]"),
    *("[nan]", "[{a:1}]", "{}", "{a:1}", "{a:0.5}", "{a:nan}", "{'*':0.5}", "{1:2}", "{a:{b:c}}"),
    *("{_target_:padst_exp.dst.Static}", "{_target_:nowhere.X}", "{_target_:5}", "[1", "{a", "'x"),
    *("a,b", "1,2", "choice(1,2)", "range(1,3)", "glob(*)", "int('3')", "str(1)", "float(1)"),
    *("a=b", "a#b", "a[1]", "(1)", "a:b", "a;b", "%s", "\\", "*", "?", "sort(1)", "1 2"),
    *("uniform", "erk", "masked", "cuda", "triton", "auto", "never", "both", "bfloat16", "float64"),
    *("cosine", "linear", "band", "stride", "magnitude", "vit.yaml", "nm", "dense", "rigl", "none"),
]  # fmt: skip


# Words that some key takes.
WORDS = [
    *("uniform", "erk", "packed", "masked", "never", "auto", "cpu", "cuda", "native", "torch"),
    *("triton", "scatter", "logits", "projected", "lognormal", "noise", "adaptive", "fixed", "in"),
    *("out", "both", "cosine", "linear", "constant", "age", "zero", "model", "layers", "paper"),
    *("code", "stride", "band", "bfloat16", "float64", "basic", "bottleneck", "imagenet", "bce"),
]


@functools.cache
def tree(*choices: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", [*choices])


def keys_of(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every node of a config by its dotted key, leaves and others."""
    found = {}
    if isinstance(node, DictConfig):
        for name in node:
            key = f"{prefix}{name}"
            inner = None if OmegaConf.is_missing(node, name) else node[name]
            found[key] = inner
            found |= keys_of(inner, f"{key}.")
    return found


def base(model: str, choices: Sequence[str]) -> list[str]:
    """A command line that is right: a model at its smallest, with some other choices of groups."""
    data = DATA[next((kind for name, kind in KINDS.items() if model.startswith(name)), "images")]
    keys = tree(f"model={model}", *data[:1]).model
    sizes = [f"model.{key}={value}" for key, value in SMALL.items() if key in keys]
    if isinstance(keys.get("mlp_ratio"), float):
        sizes.append("model.mlp_ratio=2.0")
    return [f"model={model}", *data, *sizes, *QUICK, *choices]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A right command line with up to four things done to it that are probably wrong."""
    model = draw(st.sampled_from(options("model")))
    choices = [
        f"{group}={draw(st.sampled_from(options(group)))}"
        for group in ("structure", "dst", "permutation", "optimizer", "transform")
        if draw(st.booleans())
    ]
    right = base(model, choices)
    keys = keys_of(tree(*right[:2]))
    for choice in choices:
        group = choice.partition("=")[0]
        keys = {key: value for key, value in keys.items() if not key.startswith(f"{group}.")}
        keys |= keys_of(tree(choice)[group], f"{group}.")
    wrong = [draw(_override(keys)) for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 2, 3])))]
    return [*right, *wrong]


PREFIXES = ["", "+", "++", "~"]
NEW = "zz", "_target_", "sparsty", "model@zz", "defaults", "hydra.zz", "hydra.job.zz", "a b", ""


@st.composite
def _override(draw: st.DrawFn, keys: Mapping[str, Any]) -> str:
    groups = [path.name for path in config_dir().iterdir() if path.is_dir()]
    kinds = ["value"] * 14 + ["option", "group", "new", "delete", "any", "misspelt"]
    kind = draw(st.sampled_from(kinds))
    key = draw(st.sampled_from([*keys]))
    value = draw(st.one_of(st.sampled_from(WILD), _like(keys[key]), _like(keys[key])))
    prefix = draw(st.sampled_from(PREFIXES))
    if kind == "option":
        group = draw(st.sampled_from([*GROUPS, "recipe", "debug", "experiment"]))
        return f"{group}={draw(st.sampled_from(options(group)))}"
    if kind == "group":
        return f"{prefix}{draw(st.sampled_from(groups))}={value}"
    if kind == "new":
        return f"+{draw(st.sampled_from([*NEW, f'{key}.zz', f'{key}x']))}={value}"
    if kind == "delete":
        return f"~{key}" if draw(st.booleans()) else f"~{key}={value}"
    if kind == "any":
        return draw(st.text(max_size=12).filter(lambda text: not text.startswith("-")))
    if kind == "misspelt":
        place = draw(st.integers(0, len(key) - 1))
        return f"{key[:place]}{key[place + 1 :]}={value}"
    # Mostly as one would write it.
    return f"{prefix if value == '1' else ''}{key}={value}"


def _like(value: Any) -> st.SearchStrategy[str]:
    """Values of the type that a key has: what a constructor has to judge itself."""
    whole = st.one_of(st.integers(-3, 40), st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**6))
    broken = st.one_of(st.floats(0, 1), st.floats(-3.4e38, 3.4e38), st.floats(0, 100))
    if isinstance(value, bool):
        return st.sampled_from(["true", "false"])
    if isinstance(value, int):
        return whole.map(str)
    if isinstance(value, float):
        return st.one_of(broken.map(repr), whole.map(str))
    if isinstance(value, str):
        return st.sampled_from([*WORDS, value])
    if isinstance(value, ListConfig):
        return st.lists(st.one_of(broken, st.integers(-2, 30)), max_size=4).map(str)
    return st.one_of(whole.map(str), broken.map(repr), st.sampled_from(["null", *WORDS]))


def meaningless(config: object) -> list[object]:
    """Numbers of an accepted config that nothing can be computed with."""
    if isinstance(config, dict):
        return [bad for value in config.values() for bad in meaningless(value)]
    if isinstance(config, list):
        return [bad for value in config for bad in meaningless(value)]
    return [config] if isinstance(config, float) and not math.isfinite(config) else []
