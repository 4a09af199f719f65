"""Objects as the YAML files of conf/ describe them, so that no test keeps defaults of its own."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from padst_exp.config import build, config_dir


def leaf(path: str, /, **changes: Any) -> DictConfig:
    """The constructor call in conf/`path`.yaml, with some keys changed."""
    group = path.partition("/")[0]
    tree = OmegaConf.load(config_dir() / f"{path}.yaml")
    bases = [x for x in tree.pop("defaults", []) if isinstance(x, str) and x != "_self_"]
    parts = [leaf(f"{group}/{base}") for base in bases]
    call = OmegaConf.merge(*parts, tree.get(group, tree), changes)
    assert isinstance(call, DictConfig)
    return call


def from_yaml(path: str, /, **changes: Any) -> Any:
    """What that call makes."""
    return build(leaf(path, **changes), path.partition("/")[0])
