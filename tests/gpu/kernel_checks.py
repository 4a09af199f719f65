"""Every kernel of a sparse layer against float64 in plain PyTorch, through a dense weight.

A kernel passes when its error is at most twice that of PyTorch's dense product in the same dtype.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from padst_exp.bench.choices import Layer, Sparsity
from padst_exp.inference.features import Fusion, TiledFeatureLinear
from padst_exp.inference.linear import PackedLinear
from padst_exp.inference.packing import packed_layer
from padst_exp.layers import SparseLinear
from padst_exp.sparsify import sparsify
from padst_kernels.tiles import aligned_features

# What two roundings of a result may differ by where a dense product happens to be exact.
EXACT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
Results = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Check:
    """One comparison of a kernel with what is expected."""

    kernel: str
    what: str
    error: float
    limit: float

    @property
    def reason(self) -> str:
        """Why the kernel is refused; "" where it passes. An error that is no number refuses too."""
        wrong = not self.error <= self.limit
        return f"{self.what}: error {self.error:.2g} of {self.limit:.2g}" if wrong else ""


def checks(
    kind: Sparsity, layer: Layer, density: float, num_tokens: int, dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Check]:  # fmt: skip
    """All kernels of one sparse layer, without and with permutations on its side.

    Raises:
        UserError: the structure cannot hold that density in this layer.
    """
    for permutation in ("none", "hard"):
        model, learner = layer.build(), replace(kind, permutation=permutation).learner()
        model[0].bias = nn.Parameter(torch.randn(layer.outputs))  # type: ignore[index, union-attr]
        sparsify(model, layer.rules("all"), structure=kind.structure, density=density,
                 learner=learner)  # fmt: skip
        sparse = model.to(device, dtype)[0]  # type: ignore[index]
        assert isinstance(sparse, SparseLinear)
        x = layer.example(num_tokens).to(device, dtype)
        dy = torch.randn(num_tokens, layer.outputs).to(device, dtype)
        what = f"{num_tokens} tokens, {layer.label}, {permutation} permutation"
        yield from _trained(sparse, x, dy, what)
        with torch.no_grad():
            yield from _exported(sparse, x, dy, what)


def _trained(layer: SparseLinear, x: Tensor, dy: Tensor, what: str) -> Iterator[Check]:
    """Forward and every gradient, by each backend."""

    def dense(dtype: torch.dtype) -> Sequence[Tensor]:
        own = copy.deepcopy(layer).to(dtype)
        leaf, values = x.to(dtype).requires_grad_(), [weight.values for weight in own.parts()]
        y = linear(leaf, own.weight, own.bias)
        return [y.detach(), *torch.autograd.grad(y, (leaf, *values), dy.to(dtype))]

    for backend in layer.backends(x.device):

        def sparse(backend: str = backend) -> Sequence[Tensor]:
            own = copy.deepcopy(layer)
            own.use_backend(backend)  # type: ignore[arg-type]
            leaf = x.detach().requires_grad_()
            y = own(leaf)
            values = [weight.values for weight in own.parts()]
            return [y.detach(), *torch.autograd.grad(y, (leaf, *values), dy)]

        yield from compare(f"packed, {backend}", what, sparse, dense, x.dtype)


def _exported(layer: SparseLinear, x: Tensor, residual: Tensor, what: str) -> Iterator[Check]:
    """What export makes of it; of tiles also in feature-major blocks, with every epilogue."""

    def dense(dtype: torch.dtype) -> Sequence[Tensor]:
        own = copy.deepcopy(layer).to(dtype)
        return [linear(x.to(dtype), own.weight, own.bias)]

    packed = packed_layer(layer)
    for backend in packed.backends():
        packed.backend = backend
        yield from compare(f"exported, {backend}", what, lambda: [packed(x)], dense, x.dtype)
        for used in itertools.product((False, True), repeat=3) if packed.tiles else ():
            yield from _fused(layer, packed, x, residual, used, what)


def _fused(
    layer: SparseLinear,
    packed: PackedLinear,
    x: Tensor,
    residual: Tensor,
    used: tuple[bool, ...],
    what: str,
) -> Iterator[Check]:
    """A product of feature-major blocks, with what surrounds it: norm, GELU, residual."""
    normed, active, added = used
    norm = nn.LayerNorm(layer.in_features, device=x.device, dtype=x.dtype)

    def dense(dtype: torch.dtype) -> Sequence[Tensor]:
        own, wide = copy.deepcopy(layer).to(dtype), x.to(dtype)
        wide = layer_norm(wide, wide.shape[-1:], eps=norm.eps) if normed else wide
        y = linear(wide, own.weight, own.bias)
        y = gelu(y) if active else y
        return [y + residual.to(dtype) if added else y]

    fusion = Fusion(norm if normed else None, gelu="exact" if active else "none", residual=added)
    features = TiledFeatureLinear(packed, packed.backend, fusion)
    wide = x.float()
    statistics = (wide.mean(1), (wide.var(1, unbiased=False) + norm.eps).rsqrt())
    rows, plus = aligned_features(x).t(), aligned_features(residual).t()

    def fused() -> Sequence[Tensor]:
        return [features(rows, plus if added else None, statistics if normed else None)]

    how = ", ".join(n for n, on in zip(("norm", "gelu", "residual"), used, strict=True) if on)
    yield from compare(f"features, {packed.backend}", f"{what}, {how}", fused, dense, x.dtype)


def compare(
    kernel: str, what: str, ours: Results, dense: Callable[[torch.dtype], Sequence[Tensor]],
    dtype: torch.dtype,
) -> Iterator[Check]:  # fmt: skip
    """A check for each result of a kernel; `dense` computes them in any dtype."""
    truth, usual = dense(torch.float64), dense(dtype)
    try:
        results = ours()
    except Exception as error:  # a kernel that does not compile or run fails its check
        yield Check(kernel, f"{what}: {type(error).__name__}: {error}"[:200], float("inf"), 0.0)
        return
    names = ("y", "dX", *(f"dW {part}" for part in range(len(truth) - 2)))
    for name, result, low, true in zip(names, results, usual, truth, strict=False):
        limit = 2 * _error(low, true) + EXACT[dtype]
        yield Check(kernel, f"{name}, {what}", _error(result, true), limit)


def _error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm().clamp_min(1e-30))
