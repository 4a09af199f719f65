"""An exponential moving average of a model's weights that follows every change of topology."""

import copy

import torch
from torch import Tensor, nn

from padst_exp.engine.distributed import own_part
from padst_exp.layers import Move, SparseWeight, sparse_weights
from padst_exp.permutations import Exchange, Permutation
from padst_exp.soft import Soft, choices


class Average:
    """Keeps `model`, an average over the training of another model of the same architecture.

    The decay grows with the steps, min(decay, (1 + t) / (10 + t)), so that the random start is
    soon forgotten.

    Args:
        source: the trained model; copied, so build it before compiling.
        decay: the final decay.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(source).requires_grad_(False).eval()
        self.pair(source)

    def follow(self, name: str, weight: SparseWeight, move: Move, step: int) -> None:
        """Let the averaged values of one weight take the same topology; `pair` comes next."""
        own = sparse_weights(self.model)[name]
        own.settle()
        own.adopt(move.change)

    def harden(self, name: str, choice: Tensor) -> None:
        """Let one averaged choice harden as that of the source did; `pair` comes next."""
        own = choices(self.model)[name]
        own.harden(choice.to(next(own.buffers()).device))

    def exchange(self, name: str, proposal: Exchange) -> None:
        """Let one averaged permutation be exchanged as that of the source was; then `pair`."""
        own = choices(self.model)[name]
        assert isinstance(own, Permutation)
        own.exchange(proposal)

    def pair(self, source: nn.Module) -> None:
        """Pair up the tensors with those of `source`; again whenever some are other ones."""
        own, other = dict(self.model.named_parameters()), dict(source.named_parameters())
        assert own.keys() == other.keys(), own.keys() ^ other.keys()
        self._own: list[Tensor] = [own_part(mean.detach()) for mean in own.values()]
        self._other: list[Tensor] = [own_part(other[name].detach()) for name in own]
        # Topologies and permutations are moved by whoever moves those of the source.
        buffers = dict(source.named_buffers())
        self._statistics = [
            (buffer, buffers[f"{prefix}.{name}"])
            for prefix, module in self.model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            or (isinstance(module, Soft) and name in module.copied)
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` completed steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._own, self._other, 1 - decay)
        for own, other in self._statistics:
            own.copy_(other)
