"""Objects as the YAML files of conf/ describe them, so that no test keeps defaults of its own."""

from collections.abc import Callable
from typing import Any, TypeVar

from omegaconf import OmegaConf

from padst_exp.config import config_dir, option, option_node

T = TypeVar("T")


leaf, from_yaml = option_node, option


def asked(name: str, schema: Callable[..., T], /, **changes: Any) -> T:
    """The keys of an entry point as conf/`name`.yaml has them, with some changed."""
    tree = OmegaConf.to_container(OmegaConf.load(config_dir() / f"{name}.yaml"))
    assert isinstance(tree, dict)
    keys = {str(key): value for key, value in tree.items() if key not in ("defaults", "hydra")}
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()}
    return schema(**own | changes)
