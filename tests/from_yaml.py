"""Objects as the YAML files of conf/ describe them, so that no test keeps defaults of its own."""

from collections.abc import Callable
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from padst_exp.config import build, config_dir

T = TypeVar("T")


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


def asked(name: str, schema: Callable[..., T], /, **changes: Any) -> T:
    """The keys of an entry point as conf/`name`.yaml has them, with some changed."""
    tree = OmegaConf.to_container(OmegaConf.load(config_dir() / f"{name}.yaml"))
    assert isinstance(tree, dict)
    keys = {str(key): value for key, value in tree.items() if key not in ("defaults", "hydra")}
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    return schema(**own | changes)
