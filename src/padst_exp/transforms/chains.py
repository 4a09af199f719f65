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
    # The tensors themselves are kept, so that no identity is used twice.
    made: list[tuple[Tensor, Chain]] = []

    def reads(x: object) -> Chain | None:
        return next((chain for tensor, chain in made if tensor is x), None)

    def hook(name: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if name in found:
                made.append((output, found[name]))
                return
            chain = reads(args[0]) if args else None
            if chain is None:
                return
            if isinstance(module, nn.BatchNorm2d) and chain.norm is chain.act is None:
                chain.norm, chain.act = _apart(module)
                chain.norm_name = name
                chain.act_name = None if chain.act is None else name
                made.append((output, chain))
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
    return found


def is_activation(module: nn.Module) -> bool:
    """Whether `module` is an activation of torch, timm or transformers."""
    home = type(module).__module__
    return "activation" in home and not isinstance(module, nn.MultiheadAttention)


def model_activation(model: nn.Module) -> nn.Module:
    """The first activation of `model`; a ReLU where it has none as a module."""
    return next((m for m in model.modules() if is_activation(m)), nn.ReLU())


def _apart(norm: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """A norm and its activation; timm has batch norms that activate as well."""
    act = getattr(norm, "act", None)
    if not isinstance(act, nn.Module):
        return norm, None
    plain = copy.deepcopy(norm)
    plain.act = nn.Identity()
    return plain, None if isinstance(act, nn.Identity) else act
