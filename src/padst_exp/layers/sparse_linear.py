"""The drop-in sparse layer: sparse weights, their permutations, a bias."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from padst_exp.layers.dense_gradient import collect_dense_gradients, collect_from_matrix
from padst_exp.layers.low_rank import LowRank
from padst_exp.layers.sparse_weight import SparseWeight
from padst_exp.permutations import Permutation
from padst_exp.structures import Backend, Folding, Product, backends, product, runs


class SparseLinear(nn.Module):
    """y = P_out S P_in x + U V x + b, for `nn.Linear`, transformers' `Conv1D`, fused projections.

    Args:
        weights: one sparse weight, or several whose outputs are concatenated (Q, K and V). Each
            has a structure, a budget and a topology of its own.
        bias: `[sum of O]`, or None. A parameter is taken as it is, frozen, shared or hooked.
        input_permutation: acts on x, shared by all weights; None for the identity.
        output_permutations: one (or None) for each weight.
        companion: U V, or None.

    Attributes:
        products: what multiplies; their outputs are concatenated. One, where all weights run as
            one.
        backend: what computes them, one of `backends`.
        silences_rows: whether the bias of a row without active entries counts as zero.
        stale: a topology changed, a permutation hardened or a state was loaded since `index`.
            Forward then calls `index` by itself, once for all weights.
    """

    live: Tensor | None
    products: nn.ModuleList
    # How many neighbouring inputs of a weight belong to one position of a convolution's kernel.
    taps = 1

    def __init__(
        self,
        weights: Sequence[SparseWeight],
        bias: Tensor | None,
        input_permutation: Permutation | None,
        output_permutations: Sequence[Permutation | None],
        companion: LowRank | None = None,
    ) -> None:
        super().__init__()
        self.weights = nn.ModuleList(weights)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach().clone())
        self._parameters["bias"] = bias  # read through a property
        self.input_permutation = input_permutation
        # Empty modules stand for "no permutation here", which a ModuleList cannot hold.
        self.output_permutations = nn.ModuleList(
            nn.Identity() if permutation is None else permutation
            for permutation in output_permutations
        )
        self.companion = companion
        self.silences_rows = False
        self.in_features = weights[0].shape[1]
        self.out_features = sum(weight.shape[0] for weight in weights)
        self.storage = weights[0].storage
        self.backend: Backend = self.backends(weights[0].values.device)[0]
        self.products = nn.ModuleList()
        self._parts: list[slice] = []
        # The matrix that `weight` shows, and of which tensors in which versions.
        self._shown: tuple[Tensor, list[Tensor], list[int]] | None = None
        self.stale = True
        self.register_buffer("live", None, persistent=False)
        for weight in weights:
            weight.on_change.append(self._outdate)
        for permutation in self.permutations().values():
            permutation.on_change.append(self._outdate)
        self.register_load_state_dict_post_hook(_index)
        self.index()

    @property
    def frozen(self) -> bool:
        """Whether none of its weights is trained; then hard permutations are to stay, too."""
        return all(weight.frozen for weight in self.parts())

    def parts(self) -> list[SparseWeight]:
        """The sparse weights, in the order of their outputs."""
        return [weight for weight in self.weights if isinstance(weight, SparseWeight)]

    def permutations(self) -> dict[tuple[str, int], Permutation]:
        """The permutations by side ("in" or "out") and the weight they belong to (0 for "in")."""
        sides: list[tuple[str, int, nn.Module | None]] = [("in", 0, self.input_permutation)]
        sides += [("out", i, module) for i, module in enumerate(self.output_permutations)]
        return {(side, i): m for side, i, m in sides if isinstance(m, Permutation)}

    def folding(self) -> Folding:
        """Topologies and hard permutations as they are now.

        Raises:
            UserError: somebody wrote to one of them in place.
        """
        self._check_permutations()
        weights = self.parts()
        return Folding(
            [weight.geometry for weight in weights],
            [weight.topology().active for weight in weights],
            self._input_index(),
            [_hard_index(permutation) for permutation in self.output_permutations],
        )

    def backends(self, device: torch.device) -> list[Backend]:
        """What can compute this layer on `device`, the usual choice first."""
        return backends([weight.geometry for weight in self.parts()], self.storage, device)

    def use_backend(self, backend: Backend) -> None:
        """Compute with another of `backends`."""
        if backend != self.backend:
            self.backend = backend
            self.products = nn.ModuleList()
            self.index()

    def index(self) -> None:
        """Derive from topologies and hard permutations what the products gather by."""
        folding = self.folding()
        parts = runs(folding, self.storage)
        if len(self.products) != len(parts) or parts != self._parts:
            self.products = nn.ModuleList(
                product(folding.geometries[part.start], self.storage, self.backend)
                for part in parts
            )
            self._parts = parts
        for multiply, part in zip(self.products, parts, strict=True):
            assert isinstance(multiply, Product)
            multiply.index(folding[part])
        self.live = self._live_rows(folding)
        self.stale = False

    def _live_rows(self, folding: Folding) -> Tensor | None:
        """Which outputs have a bias, bool `[O]`; None: all."""
        if not self.silences_rows or self._parameters["bias"] is None:
            return None
        # A companion, or a soft permutation of the outputs, leaves no output without inputs.
        mixed = any(p.soft for (side, _), p in self.permutations().items() if side == "out")
        if self.companion is not None or mixed:
            return None
        live = folding.live_rows()
        return None if bool(live.all()) else live

    def _check_permutations(self) -> None:
        for permutation in self.permutations().values():
            permutation.check_written()

    def _outdate(self) -> None:
        self.stale = True

    def _input_index(self) -> Tensor | None:
        """The hard permutation of all inputs of the weights, int64 `[I]`, or None."""
        index = _hard_index(self.input_permutation)
        if index is None or self.taps == 1:
            return index
        steps = torch.arange(self.taps, device=index.device) * len(index)
        return (steps[:, None] + index).flatten()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of x or of autocast.

        Raises:
            UserError: somebody wrote to a topology or a permutation in place, see their
                `check_written`.
        """
        if self.stale:
            self.index()
        elif not torch.compiler.is_compiling():
            for weight in self.parts():
                weight.check_written()
            self._check_permutations()
        dtype = _autocast_dtype(x)
        y = self._multiply(x, dtype)
        if self.companion is not None:
            y = y + self.companion(x.to(y.dtype))
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias `[O]`, zero at silent rows; None without one. Differentiable.

        The parameter itself, where no row is silent.
        """
        bias = self._parameters["bias"]
        if bias is None or not self.silences_rows:
            return bias
        if self.stale:
            self.index()
        return bias if self.live is None else bias * self.live

    def _multiply(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """P_out S P_in x."""
        if self.input_permutation is not None and self.input_permutation.soft:
            x = self._permute(x)
        x = x.to(dtype)
        outputs: list[Tensor] = []
        for multiply, part in zip(self.products, self._parts, strict=True):
            weights = self.parts()[part]
            permutations = list(self.output_permutations)[part]
            y = multiply(x, [weight.effective().to(dtype) for weight in weights])
            if torch.is_grad_enabled() and any(w.collect_dense_gradient for w in weights):
                indices = [_hard_index(permutation) for permutation in permutations]
                y = collect_dense_gradients(y, x, weights, self._input_index(), indices)
            if any(isinstance(p, Permutation) and p.soft for p in permutations):
                parts = y.split([weight.shape[0] for weight in weights], dim=-1)
                outputs += [p(part_y) for p, part_y in zip(permutations, parts, strict=True)]
            else:
                outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _permute(self, x: Tensor) -> Tensor:
        """The soft input permutation of `[..., in_features]`, at every position of a kernel."""
        assert self.input_permutation is not None
        if self.taps == 1:
            permuted: Tensor = self.input_permutation(x)
            return permuted
        permuted = self.input_permutation(x.unflatten(-1, (self.taps, -1)))
        return permuted.flatten(-2)

    @property
    def weight(self) -> Tensor:
        """The whole layer as one dense `[O, I]` matrix, permutations applied. Differentiable.

        For parents that read `weight` instead of calling the layer; `F.linear(x, weight, bias)` is
        the layer's output. In evaluation without gradients it is kept until something changes.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._matrix()
        parts = [*self.parameters(), *self.buffers()]
        if any(tensor.is_inference() for tensor in parts):  # such a tensor counts no versions
            return self._matrix()
        versions = [tensor._version for tensor in parts]
        if self._shown is None or not _same(self._shown[1], parts) or self._shown[2] != versions:
            self._shown = self._matrix(), parts, versions
        return self._shown[0]

    def train(self, mode: bool = True) -> Self:
        self._shown = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # A copy counts the versions of its own tensors.
        return {**self.__dict__, "_shown": None}

    def _matrix(self) -> Tensor:
        """`[O, I]`, what `weight` shows."""
        self._check_permutations()
        matrices = [collect_from_matrix(weight.matrix(), weight) for weight in self.parts()]
        for i, permutation in enumerate(self.output_permutations):
            if isinstance(permutation, Permutation):
                matrices[i] = (
                    permutation.matrix().to(matrices[i].dtype) @ matrices[i]
                    if permutation.soft
                    else matrices[i][permutation.index]
                )
        matrix = torch.cat(matrices)
        if self.input_permutation is not None:
            taps = matrix.view(len(matrix), self.taps, -1)
            if self.input_permutation.soft:
                taps = taps @ self.input_permutation.matrix().to(matrix.dtype)
            else:
                taps = taps[..., self.input_permutation.index.argsort()]
            matrix = taps.flatten(1)
        return matrix if self.companion is None else matrix + self.companion.matrix()

    def dense_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """What a dense layer with this `weight`, and without a bias, makes of `x`."""
        return nn.functional.linear(x, weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _index(layer: nn.Module, _: object) -> None:
    assert isinstance(layer, SparseLinear)
    layer.index()


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return None


def _hard_index(permutation: nn.Module | None) -> Tensor | None:
    if isinstance(permutation, Permutation) and not permutation.soft:
        return permutation.index
    return None


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Every sparse layer of `model` by its module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}


def sparse_weights(model: nn.Module) -> dict[str, SparseWeight]:
    """Every sparse weight of `model` by its module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseWeight)}


def permutations(model: nn.Module) -> dict[str, Permutation]:
    """Every permutation of `model` by its module name, shared ones once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Permutation)}


def index_stale(model: nn.Module) -> None:
    """Derive indices anew where something changed; now, not in a forward pass that is compiled."""
    for layer in sparse_layers(model).values():
        if layer.stale:
            layer.index()
