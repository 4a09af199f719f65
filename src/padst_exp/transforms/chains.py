"""What reads the output of a layer: its norm, its activation. Seen in a pass over fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from padst_exp.analysis.fake import fake_pass


@dataclass
class Chain:
    """What follows a layer, taken apart.

    Args:
        norm: batch norm that reads the layer, without an activation of its own; None: none does.
        act: activation that reads the norm, or the layer; None: none does.
        norm_name, act_name: where they are in the model; the same for a norm that activates too.
    """

    norm: nn.Module | None = None
    act: nn.Module | None = None
    norm_name: str | None = None
    act_name: str | None = None

    def take(self, model: nn.Module, *, act: bool) -> None:
        """Take the norm out of `model`, and with `act` the activation too."""
        if self.norm_name is not None:
            left = None if act or self.act_name != self.norm_name else self.act
            model.set_submodule(self.norm_name, left or nn.Identity())
        if act and self.act_name is not None and self.act_name != self.norm_name:
            model.set_submodule(self.act_name, nn.Identity())


def chains(model: nn.Module, inputs: Tensor, layers: Collection[str]) -> dict[str, Chain]:
    """The chain of every one of `layers`, by name.

    Args:
        model: any module.
        inputs: one batch for it, on its device; only shape and dtype matter.
        layers: module names.
    """
    found = {name: Chain() for name in layers}
    # The tensors themselves are kept, so that no identity is used twice. Another version of one
    # has been added to in place: a shortcut has joined.
    made: list[tuple[Tensor, int, Chain]] = []

    def remember(x: Tensor, chain: Chain) -> None:
        made.append((x, x._version, chain))

    def reads(x: Any) -> Chain | None:
        return next(
            (c for tensor, version, c in made if tensor is x and x._version == version), None
        )

    def hook(name: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if name in found:
                remember(output, found[name])
                return
            chain = reads(args[0]) if args else None
            if chain is None:
                return
            if isinstance(module, nn.BatchNorm2d) and chain.norm is chain.act is None:
                chain.norm, chain.norm_name = module, name
                remember(output, chain)
            elif is_activation(module) and chain.act is None:
                chain.act, chain.act_name = module, name

        return leave

    handles = [module.register_forward_hook(hook(n)) for n, module in model.named_modules() if n]
    try:
        with fake_pass(model):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    for chain in found.values():
        _take_apart(chain)
    return found


def is_activation(module: nn.Module) -> bool:
    """Whether `module` is an activation of torch, timm or transformers."""
    home = type(module).__module__
    return "activation" in home and not isinstance(module, nn.MultiheadAttention)


def model_activation(model: nn.Module) -> nn.Module:
    """The first activation of `model`; a ReLU where it has none as a module."""
    return next((m for m in model.modules() if is_activation(m)), nn.ReLU())


def _take_apart(chain: Chain) -> None:
    """Part a norm from its activation; timm has batch norms that activate as well."""
    act = getattr(chain.norm, "act", None)
    if chain.norm is None or not isinstance(act, nn.Module):
        return
    chain.norm = copy.deepcopy(chain.norm)
    chain.norm.act = nn.Identity()
    if not isinstance(act, nn.Identity):
        chain.act, chain.act_name = act, chain.norm_name
