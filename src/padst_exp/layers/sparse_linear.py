"""The drop-in sparse layer: sparse weights, their permutations, a bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from padst_exp.layers.sparse_weight import SparseWeight
from padst_exp.permutations import Permutation


class SparseLinear(nn.Module):
    """y = P_out S P_in x + b, for `nn.Linear`, transformers' `Conv1D` and fused projections.

    Args:
        weights: one sparse weight, or several whose outputs are concatenated (Q, K and V). Each
            has a structure, a budget and a topology of its own.
        bias: `[sum of O]`, or None.
        input_permutation: acts on x, shared by all weights; None for the identity.
        output_permutations: one (or None) for each weight.
    """

    def __init__(
        self,
        weights: Sequence[SparseWeight],
        bias: Tensor | None,
        input_permutation: Permutation | None,
        output_permutations: Sequence[Permutation | None],
    ) -> None:
        super().__init__()
        self.weights = nn.ModuleList(weights)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.input_permutation = input_permutation
        # Empty modules stand for "no permutation here", which a ModuleList cannot hold.
        self.output_permutations = nn.ModuleList(
            nn.Identity() if permutation is None else permutation
            for permutation in output_permutations
        )
        self.in_features = weights[0].layout.shape[1]
        self.out_features = sum(weight.layout.shape[0] for weight in weights)
        self._folded: list[bool] = []
        self.fold()
        self.register_load_state_dict_post_hook(_fold)

    def fold(self) -> None:
        """Fold every hard permutation into the indices of the weights; then it costs nothing."""
        input_index = _hard_index(self.input_permutation)
        for weight, permutation in zip(self.weights, self.output_permutations, strict=True):
            assert isinstance(weight, SparseWeight)
            weight.fold(input_index, _hard_index(permutation))
        self._folded = self._soft()

    @property
    def stale(self) -> bool:
        """Whether a permutation hardened since the last `fold`; forward then folds by itself."""
        return self._folded != self._soft()

    def _soft(self) -> list[bool]:
        return [_is_soft(self.input_permutation), *map(_is_soft, self.output_permutations)]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if self.stale:
            self.fold()
        if self.input_permutation is not None:
            x = self.input_permutation(x)  # the identity once hard
        outputs = []
        for weight, permutation in zip(self.weights, self.output_permutations, strict=True):
            y = weight(x)
            outputs.append(permutation(y))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _fold(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, SparseLinear)
    layer.fold()


def _is_soft(permutation: nn.Module | None) -> bool:
    return isinstance(permutation, Permutation) and permutation.soft


def _hard_index(permutation: nn.Module | None) -> Tensor | None:
    if isinstance(permutation, Permutation) and not permutation.soft:
        return permutation.index
    return None


def sparse_weights(model: nn.Module) -> dict[str, SparseWeight]:
    """Every sparse weight of `model` by its module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseWeight)}


def permutations(model: nn.Module) -> dict[str, Permutation]:
    """Every permutation of `model` by its module name, shared ones once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Permutation)}
