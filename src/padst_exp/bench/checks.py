"""Every kernel of a device against float64, before anything of it is timed.

A kernel passes when its error is at most twice that of PyTorch's dense product in the same dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from padst_exp.bench.configurations import Shape, describe
from padst_exp.bench.session import FEATURES, SCATTERED, TRITON
from padst_exp.errors import UserError
from padst_exp.structures import (
    Backend,
    Diagonal,
    Layout,
    Product,
    Structure,
    permuted_tiles,
    scatter_entries,
)
from padst_kernels.fan_in import condense, fan_in_index, fan_in_linear, fan_in_product
from padst_kernels.gather_gemm import TileIndex, aligned_features, gather_gemm_fused
from padst_kernels.gather_gemm.cuda import (
    available,
    launch_input_gradient_tile,
    num_slices,
    slice_entries,
)

# What two roundings of a result may differ by where a dense product happens to be exact.
EXACT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
CUDA, CONDENSED, FAN_IN = "dX, CUDA", "condensed", "fan_in"


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        kernel: as rows of timings name its form.
        structure: of the weight.
        what: pass, layout and epilogue.
        dtype: of weights and activations.
        error: relative, in the Frobenius norm; infinite where the kernel did not run.
        limit: at which it passes.
        note: why it did not run.
    """

    kernel: str
    structure: str
    what: str
    dtype: str
    error: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """False for results that are no numbers, too."""
        return self.error <= self.limit


def run(
    structures: Sequence[Structure],
    shapes: Sequence[Shape],
    token_counts: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    density: float = 0.1,
) -> Iterator[Check]:
    """Check all kernels on all shapes, one after the other.

    Args:
        structures: those that do not fit a shape are passed over there.
        shapes: rectangular both ways.
        token_counts: odd ones too.
        dtypes: of activations and values.
        device: a GPU, or a CPU with Triton's interpreter.
        density: of the weights.
    """
    for structure, shape, num_tokens, dtype in itertools.product(
        structures, shapes, token_counts, dtypes
    ):
        try:
            layout = structure.layout(shape.out_features, shape.in_features, density)
        except UserError:
            continue
        case = _Case(describe(structure), layout, num_tokens, dtype, device)
        if layout.tile_shape is not None:
            yield from _tiles(case)
        else:
            yield from _entries(case)
            yield from _product(case, "dense", SCATTERED)
        if isinstance(structure, Diagonal) and structure.bundle == 1:
            yield from _product(case, "triton", TRITON)


def refused(checks: Sequence[Check], dtype: torch.dtype) -> dict[tuple[str, str, bool], str]:
    """What may not be timed in a dtype, and why: kernel, structure, and whether backward.

    A pass that failed takes the backward row with it; a failed forward pass takes both.
    """
    reasons: dict[tuple[str, str, bool], str] = {}
    for check in checks:
        if check.passed or check.dtype != str(dtype).removeprefix("torch."):
            continue
        reason = f"failed its check: {check.what}, error {check.error:.2g}"
        backwards = (False, True) if check.what.startswith("forward") else (True,)
        for backward in backwards:
            reasons.setdefault((check.kernel, check.structure, backward), reason)
    return reasons


class _Case:
    """One weight with its permutations, activations, and what must come out."""

    def __init__(
        self, name: str, layout: Layout, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name, self.layout, self.dtype, self.device = name, layout, dtype, device
        self.generator = torch.Generator().manual_seed(0)
        rows, columns = layout.shape
        self.units = layout.random_units(self.generator).to(device)
        self.values = self._random(layout.num_active, layout.unit_size)
        self.entries = layout.entries(self.units)
        self.x, self.dy = self._random(num_tokens, columns), self._random(num_tokens, rows)
        self.inputs = torch.randperm(columns, generator=self.generator).to(device)
        self.outputs = torch.randperm(rows, generator=self.generator).to(device)
        # What the padding of ragged frames holds must not matter.
        self.inside = self.entries < rows * columns
        self.values = torch.where(self.inside, self.values, 0)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator).to(self.device, self.dtype)

    def permutations(self, permuted: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """Of inputs and outputs, as `Product.fold` takes them."""
        return (self.inputs, [self.outputs]) if permuted else (None, [None])

    def bias(self) -> Tensor:
        """`[O]`."""
        return self._random(self.layout.shape[0])

    def weight(self, dtype: torch.dtype, permuted: bool) -> Tensor:
        """P_out S P_in, dense."""
        dense = scatter_entries(self.values.to(dtype), self.entries, self.layout.shape)
        if not permuted:
            return dense
        placed = torch.empty_like(dense)
        placed[:, self.inputs] = dense
        return placed[self.outputs]

    def gradient_of_values(self, dweight: Tensor, permuted: bool) -> Tensor:
        """The entries of the gradient of the dense weight, `[N, E]`."""
        if permuted:
            unplaced = torch.empty_like(dweight)
            unplaced[self.outputs] = dweight
            dweight = unplaced[:, self.inputs]
        flat = torch.cat([dweight.flatten(), dweight.new_zeros(1)])
        return flat[self.entries]

    def compare(
        self,
        kernel: str,
        names: Sequence[str],
        ours: Callable[[], Sequence[Tensor]],
        plain: Callable[[torch.dtype], Sequence[Tensor]],
    ) -> Iterator[Check]:
        """A check for each result of `ours`; `plain` computes them in any dtype."""
        truth, usual = plain(torch.float64), plain(self.dtype)
        dtype = str(self.dtype).removeprefix("torch.")
        try:
            results = ours()
            errors = [_error(result, true) for result, true in zip(results, truth, strict=True)]
            note = ""
        except Exception as failure:
            # A kernel that does not compile or run fails its check; the others go on.
            errors = [float("inf")] * len(names)
            note = " ".join(f"{type(failure).__name__}: {failure}".split())[:160]
        for name, error, low, true in zip(names, errors, usual, truth, strict=True):
            limit = 2 * _error(low, true) + EXACT[self.dtype]
            what = f"{name}, {len(self.x)} tokens, {'x'.join(map(str, self.layout.shape))}"
            yield Check(kernel, self.name, what, dtype, error, limit, note)


def _error(result: Tensor, truth: Tensor) -> float:
    difference = result.double() - truth
    return float(difference.norm() / truth.norm().clamp_min(1e-30))


PASSES = ("forward", "dX", "dW")


def _differentiated(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, values: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    x, values = x.detach().requires_grad_(), values.detach().requires_grad_()
    y = product(x, values)
    return (y.detach(), *torch.autograd.grad(y, (x, values), dy))


def _plain(case: _Case, permuted: bool) -> Callable[[torch.dtype], Sequence[Tensor]]:
    def plain(dtype: torch.dtype) -> Sequence[Tensor]:
        weight, x, dy = case.weight(dtype, permuted), case.x.to(dtype), case.dy.to(dtype)
        return linear(x, weight), dy @ weight, case.gradient_of_values(dy.t() @ x, permuted)

    return plain


def _product(case: _Case, backend: Backend, kernel: str) -> Iterator[Check]:
    """The product that training uses."""
    for permuted in (False, True):
        product = Product([case.layout], "packed", backend)
        product.fold([case.units], *case.permutations(permuted))
        yield from _passes(case, product, kernel, permuted)


def _passes(case: _Case, product: Product, kernel: str, permuted: bool) -> Iterator[Check]:
    suffix = ", permuted" if permuted else ""
    yield from case.compare(
        kernel,
        [name + suffix for name in PASSES],
        lambda: _differentiated(
            lambda x, values: product(x, [values]), case.x, case.values, case.dy
        ),
        _plain(case, permuted),
    )


def _tiles(case: _Case) -> Iterator[Check]:
    """gather_gemm in both layouts, its epilogues, and dX in CUDA."""
    yield from _product(case, "triton", TRITON)
    for permuted in (False, True):
        index = permuted_tiles([case.layout], [case.units], *case.permutations(permuted))
        yield from _features(case, index, permuted)
        yield from _cuda(case, index, permuted)


EPILOGUES = ("", "bias", "bias gelu", "bias gelu residual", "norm bias")


def _features(case: _Case, index: TileIndex, permuted: bool) -> Iterator[Check]:
    """The feature-major product with each epilogue."""
    tile_shape = case.layout.tile_shape
    assert tile_shape is not None
    bias, residual = case.bias(), case.dy

    def ours(epilogue: str) -> Sequence[Tensor]:
        x = aligned_features(case.x)
        norm = None
        if "norm" in epilogue:
            wide = case.x.float()
            rstd = (wide.var(1, unbiased=False) + NORM_EPSILON).rsqrt()
            norm = wide.mean(1), rstd, case.weight(torch.float32, permuted).sum(1)

        def product(x: Tensor, values: Tensor) -> Tensor:
            return gather_gemm_fused(
                x,
                values.reshape(-1, *tile_shape),
                index,
                case.layout.shape[0],
                backend="triton",
                bias=bias if "bias" in epilogue else None,
                gelu="gelu" in epilogue,
                residual=aligned_features(residual) if "residual" in epilogue else None,
                norm=norm,
            )

        if norm is not None:
            with torch.no_grad():
                return [product(x, case.values).t()]
        y, dx, dvalues = _differentiated(product, x, case.values, aligned_features(case.dy))
        return y.t(), dx.t(), dvalues

    def plain(epilogue: str, dtype: torch.dtype) -> Sequence[Tensor]:
        def whole(x: Tensor, weight: Tensor) -> Tensor:
            x = layer_norm(x, x.shape[-1:], eps=NORM_EPSILON) if "norm" in epilogue else x
            y = linear(x, weight)
            y = y + bias.to(dtype) if "bias" in epilogue else y
            y = gelu(y) if "gelu" in epilogue else y
            return y + residual.to(dtype) if "residual" in epilogue else y

        weight, x, dy = case.weight(dtype, permuted), case.x.to(dtype), case.dy.to(dtype)
        if "norm" in epilogue:
            return [whole(x, weight)]
        y, dx, dweight = _differentiated(whole, x, weight, dy)
        return y, dx, case.gradient_of_values(dweight, permuted)

    for epilogue in EPILOGUES:
        names = PASSES[:1] if "norm" in epilogue else PASSES
        suffix = f", feature-major {epilogue}".rstrip() + (", permuted" if permuted else "")
        yield from case.compare(
            FEATURES,
            [name + suffix for name in names],
            partial(ours, epilogue),
            partial(plain, epilogue),
        )


NORM_EPSILON = 1e-6


def _cuda(case: _Case, index: TileIndex, permuted: bool) -> Iterator[Check]:
    """dX with a tile in shared memory, where the device and the weight allow it."""
    tile_shape = case.layout.tile_shape
    half = case.dtype in (torch.bfloat16, torch.float16)
    if not half or not available(case.device) or index.tile_rows is None or tile_shape is None:
        return
    properties = torch.cuda.get_device_properties(case.device)
    in_features, height = case.layout.shape[1], tile_shape[1]
    slices = num_slices(in_features, height, properties.shared_memory_per_block_optin)
    columns = index.columns
    if index.order is not None:
        columns = torch.empty_like(columns).index_copy_(0, index.order.long(), columns)
    entries = slice_entries(columns, in_features, slices)
    tiles, rows = case.values.reshape(-1, *tile_shape).contiguous(), index.tile_rows

    def ours() -> Sequence[Tensor]:
        dy = aligned_features(case.dy)
        return [launch_input_gradient_tile(dy, tiles, rows, entries, in_features).t()]

    suffix = ", permuted" if permuted else ""
    plain = _plain(case, permuted)
    yield from case.compare(CUDA, [f"dX{suffix}"], ours, lambda dtype: plain(dtype)[1:2])


def _entries(case: _Case) -> Iterator[Check]:
    """Weights of single entries, trained and condensed."""
    rows, columns = case.layout.shape
    flat, values = case.entries.flatten(), case.values.flatten()
    index = fan_in_index(flat, rows, columns)
    yield from case.compare(
        FAN_IN,
        PASSES,
        lambda: _differentiated(
            lambda x, values: fan_in_product(x, values, index, rows), case.x, case.values, case.dy
        ),
        _plain(case, False),
    )
    weight = condense(values, flat, rows, columns)
    plain = _plain(case, False)
    yield from case.compare(
        CONDENSED,
        PASSES[:1],
        lambda: [fan_in_linear(case.x, weight)],
        lambda dtype: plain(dtype)[:1],
    )
