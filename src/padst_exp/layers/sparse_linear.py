"""The drop-in sparse layer: sparse weights, their permutations, a bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from padst_exp.layers.dense_gradient import collect_dense_gradient
from padst_exp.layers.sparse_weight import SparseWeight
from padst_exp.permutations import Permutation
from padst_exp.structures import Backend, Product, alike


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
        layouts = [weight.layout for weight in weights]
        self.in_features = layouts[0].shape[1]
        self.out_features = sum(layout.shape[0] for layout in layouts)
        storage = weights[0].storage
        # Projections run as one product where they can: x is read once.
        groups = [layouts] if alike(layouts, storage) else [[layout] for layout in layouts]
        self.products = nn.ModuleList(Product(group, storage) for group in groups)
        self._folded: list[bool] = []
        self.fold()
        for weight in weights:
            weight.on_change = self._outdate
        self.register_load_state_dict_post_hook(_fold)

    def fold(self) -> None:
        """Fold topologies and hard permutations into the indices of the products."""
        input_index = _hard_index(self.input_permutation)
        for product, weights, permutations in self._groups():
            product.fold(
                [weight.active.long() for weight in weights],
                input_index,
                [_hard_index(permutation) for permutation in permutations],
            )
        self._folded = self._soft()

    def parts(self) -> list[Product]:
        """The products whose outputs are concatenated; one where all projections run as one."""
        return [product for product in self.products if isinstance(product, Product)]

    def use_backends(self, backends: Sequence[Backend]) -> None:
        """Compute each of `parts` with its backend, one of those it has on its device."""
        pairs = zip(self.parts(), backends, strict=True)
        changed = [(product, backend) for product, backend in pairs if product.backend != backend]
        for product, backend in changed:
            product.use_backend(backend)
        if changed:
            self.fold()

    @property
    def stale(self) -> bool:
        """Whether a topology changed or a permutation hardened since the last `fold`.

        Forward then folds by itself, once for all weights.
        """
        return self._folded != self._soft()

    def _outdate(self) -> None:
        self._folded = []

    def _soft(self) -> list[bool]:
        return [_is_soft(self.input_permutation), *map(_is_soft, self.output_permutations)]

    def _groups(self) -> Iterator[tuple[Product, list[SparseWeight], list[nn.Module]]]:
        """Each product with its weights and their output permutations."""
        weights, permutations = iter(self.weights), iter(self.output_permutations)
        for product in self.parts():
            count = len(product.layouts)
            own = [weight for weight in islice(weights, count) if isinstance(weight, SparseWeight)]
            yield product, own, list(islice(permutations, count))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of x or of autocast."""
        if self.stale:
            self.fold()
        if self.input_permutation is not None:
            x = self.input_permutation(x)  # the identity once hard
        cast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if cast else None
        x = x.to(dtype)
        outputs: list[Tensor] = []
        for product, weights, permutations in self._groups():
            y = product(x, [weight.values.to(dtype) for weight in weights])
            if self._needs_parts(weights, permutations):
                sizes = [weight.layout.shape[0] for weight in weights]
                outputs += [
                    self._finish(part, x, weight, permutation)
                    for part, weight, permutation in zip(
                        y.split(sizes, dim=-1), weights, permutations, strict=True
                    )
                ]
            else:
                outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _needs_parts(self, weights: list[SparseWeight], permutations: list[nn.Module]) -> bool:
        collecting = weights[0].collect_dense_gradient and torch.is_grad_enabled()
        return collecting or any(map(_is_soft, permutations))

    def _finish(self, y: Tensor, x: Tensor, weight: SparseWeight, permutation: nn.Module) -> Tensor:
        """What is done to the output of one weight alone."""
        if weight.collect_dense_gradient and torch.is_grad_enabled():
            indices = _hard_index(self.input_permutation), _hard_index(permutation)
            y = collect_dense_gradient(y, x, weight, *indices)
        finished: Tensor = permutation(y)
        return finished

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
